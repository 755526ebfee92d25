"""Every CUDA operator once on small odd sizes, for compute-sanitizer."""

from __future__ import annotations

import torch

import fastforest as ff


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    for height, width, leaves, sigma in ((9, 11, 7, 1.0), (33, 20, 68, 2.0), (1, 1, 1, 1.0)):
        pool = torch.rand(height, width, leaves, device=device) + 0.05
        pool = (pool / pool.sum((0, 1))).requires_grad_()
        prob = torch.softmax(torch.randn(2, 5, leaves, device=device), -1).requires_grad_()
        points = torch.rand(2, 5, 2, device=device) * 12 - 2
        weight = torch.rand(2, 5, device=device)
        (ff.pool_kl_loss(prob, pool, points, sigma, weight=weight).sum()).backward()
        (ff.pool_l2_loss(prob, pool, points, sigma, weight=weight).sum()).backward()
        out = torch.zeros(height, width, leaves, device=device)
        ff.pool_kl_statistics(prob, pool, points, sigma, weight=weight, out=out)
        ff.pool_l2_statistics(prob, points, sigma, (height, width), weight=weight)
        ff.pool_expectation(prob, pool)
        for refine in ("none", "quarter_sign", "quarter_second"):
            ff.pool_peak(prob, pool, refine)
            ff.peak(torch.rand(2, 5, height, width, device=device), refine)
        for refine in ("dark", "dark_udp", "local"):
            ff.peak(torch.rand(2, 5, height, width, device=device) * 60, refine)  # above 50 in part: clips act
        marks = points.detach().clone().requires_grad_()
        ff.render_gaussian(marks, sigma, (height, width)).sum().backward()
        for window in (None, 2):
            heatmap = torch.randn(2, 5, height, width, device=device, requires_grad=True)
            ff.soft_argmax(heatmap, 3.0, window=window).sum().backward()
    for height, width in ((9, 11), (33, 36), (184, 182), (1, 1)):
        for layout in (torch.contiguous_format, torch.channels_last):
            maps = torch.randn(2, 5, height, width, device=device).to(memory_format=layout).requires_grad_()
            points, weight = torch.rand(2, 5, 2, device=device) * 12 - 2, torch.rand(2, 5, device=device).round()
            ff.heatmap_mse_loss(maps, points, 1.5, weight=weight, foreground_weight=5.0).backward()
            ff.adaptive_wing_loss(maps, points, 1.5, weight=weight).backward()
            ff.adaptive_wing_loss(maps, points, 1.5, epsilon=0.2).backward()
            ff.heatmap_kl_loss(maps, points, 1.5, weight=weight).backward()
            ff.heatmap_js_loss(maps, points, 1.5, weight=weight).backward()
            ff.heatmap_variance_loss(maps, 1.5, weight=weight).backward()
    for samples, features, trees, depth in ((1, 1, 1, 1), (5, 13, 3, 6), (3, 2, 1, 14), (3, 13001, 2, 3)):
        phi = ff.draw_phi(features, trees, depth).to(device)
        steepness = torch.tensor(2.0, device=device, requires_grad=True)
        for log in (False, True):
            units = torch.randn(samples, features, device=device, requires_grad=True)
            ff.route(units, phi if log else phi.int(), steepness, log=log).sum().backward()
    for samples, trees, count, size in ((1, 1, 1, (1,)), (67, 2, 65, (3,)), (7, 3, 5, (11, 13))):
        routed = torch.rand(samples, trees, count, device=device).softmax(-1).requires_grad_()
        leaves = torch.rand(trees, count, *size, device=device, requires_grad=True)
        target = torch.rand(samples, *size, device=device)
        for forest in (False, True):
            ff.categorical_log_prob(routed, leaves, forest=forest).sum().backward()
            ff.categorical_kl_loss(routed, leaves, target, forest=forest).sum().backward()
            ff.categorical_l2_loss(routed, leaves, target, forest=forest, mask_threshold=0.1).sum().backward()
            ff.categorical_statistics(routed, leaves, target, forest=forest)
    for samples, leaves, dims in ((1, 1, 1), (67, 3, 4), (5, 17, 20), (3, 2, 71)):
        x = torch.randn(samples, dims, device=device, requires_grad=True)
        mean = torch.randn(leaves, dims, device=device, requires_grad=True)
        tril = torch.eye(dims, device=device).repeat(leaves, 1, 1).requires_grad_()
        log_weight = torch.zeros(samples, leaves, device=device, requires_grad=True)
        ff.gaussian_log_prob(x, mean, tril).sum().backward()
        ff.gaussian_mixture_log_prob(x, log_weight, mean, tril).sum().backward()
        ff.gaussian_responsibilities(x, log_weight, mean, tril).square().sum().backward()
        ff.gaussian_statistics(x, log_weight, mean, tril, torch.rand(samples, device=device))
    torch.cuda.synchronize()
    print("every operator ran")


if __name__ == "__main__":
    main()
