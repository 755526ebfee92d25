"""Recipes: whole experiments, from a set of data to figures. Nothing else imports them."""
