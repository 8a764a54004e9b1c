// The size of the last cache of the processor that runs this.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace deeplab_fast::cpu {

// Bytes of the third-level cache of one domain, 0 where it is not known. sysconf tells the sum over
// all domains on some processors: 256 MiB where each has 32.
inline int64_t third_level_cache() {
#if defined(__x86_64__) && defined(__GNUC__)
  // The caches one by one, in the same form by Intel and by AMD.
  constexpr unsigned kLeaves[] = {4, 0x8000001D};
  constexpr unsigned kMostCaches = 16;
  for (const unsigned leaf : kLeaves) {
    for (unsigned index = 0; index < kMostCaches; ++index) {
      unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
      if (__get_cpuid_count(leaf, index, &eax, &ebx, &ecx, &edx) == 0 || (eax & 31) == 0) break;
      if ((eax >> 5 & 7) == 3) {
        const int64_t ways = (ebx >> 22) + 1, partitions = (ebx >> 12 & 1023) + 1;
        return ways * partitions * ((ebx & 4095) + 1) * (int64_t{ecx} + 1);
      }
    }
  }
#endif
  return 0;
}

}  // namespace deeplab_fast::cpu
