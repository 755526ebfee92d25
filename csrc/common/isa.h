// Which build of the CPU kernels runs: chosen once, at first use, from what the processor has and FASTFOREST_ISA.
#pragma once
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ff {

enum class Isa { baseline, avx2, avx512 };

inline const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

inline bool supported(Isa isa) {
#if defined(FF_X86)
  __builtin_cpu_init();
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

inline Isa chosen_isa() {
  static const Isa chosen = [] {
    const char* wanted = std::getenv("FASTFOREST_ISA");
    for (Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline})
      if (supported(isa) && (!wanted || !*wanted || !std::strcmp(wanted, name(isa)))) return isa;
    throw std::runtime_error(std::string("FASTFOREST_ISA must name an instruction set of this processor "
                                         "(baseline, avx2 or avx512), got '") +
                             wanted + "'");
  }();
  return chosen;
}

// The kernels of a room are a table of function pointers, built once per instruction set.
template <class Table>
const Table& choose(const Table& baseline, const Table& avx2, const Table& avx512) {
  switch (chosen_isa()) {
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return baseline;
  }
}

}  // namespace ff
