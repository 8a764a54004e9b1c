// Which instruction set the C++ code runs in: each family of kernels has its own.
#pragma once

#include <string>

namespace deeplab_fast::cpu {

enum Family : int { kConvolutions, kUpsampling, kBatchNorm, kNumFamilies };

constexpr const char* kFamilies[kNumFamilies] = {"convolutions", "upsampling", "batch_norm"};

// The name of the one in use: that of DEEPLAB_FAST_CPU_SET or `instruction_set`, where there is
// one, else what `suggest_set` named, else the automatic one.
const char* current_set_name(Family family);

// The set of the convolutions. A name makes that set the one of all families, "auto" undoes it.
std::string instruction_set(std::string name);

// The set of a family, after making a name that is not empty its automatic one.
std::string suggest_set(std::string family, std::string name);

}  // namespace deeplab_fast::cpu
