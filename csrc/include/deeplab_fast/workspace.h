// Memory for the buffers of a call, kept for the next one: what malloc maps anew is faulted in page
// by page at every call. Free of torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <utility>

namespace deeplab_fast::cpu {

// Floats aligned to 64 bytes, not initialised. At most kKept blocks wait for the next call, of at
// most kKeptBytes each; they are not freed when the process ends, as a thread may still use one.
class Workspace {
 public:
  static constexpr int kKept = 2;
  static constexpr int64_t kKeptBytes = int64_t{64} << 20;

  explicit Workspace(int64_t floats) {
    if (floats <= 0) return;
    for (std::atomic<Block*>& place : kept()) {
      block_ = place.exchange(nullptr, std::memory_order_acquire);
      if (block_ != nullptr && block_->floats >= floats) return;
      // Too small: the larger one that is made now will serve both.
      free(block_);
    }
    block_ = new Block{allocate(floats), floats};
  }

  Workspace(Workspace&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  Workspace& operator=(Workspace&&) = delete;

  ~Workspace() {
    if (block_ == nullptr) return;
#if !defined(DEEPLAB_FAST_SANITIZE)
    if (block_->floats * static_cast<int64_t>(sizeof(float)) <= kKeptBytes) {
      for (std::atomic<Block*>& place : kept()) {
        Block* none = nullptr;
        if (place.compare_exchange_strong(none, block_, std::memory_order_release)) return;
      }
    }
#endif
    free(block_);
  }

  float* data() const { return block_ == nullptr ? nullptr : block_->data; }

 private:
  struct Block {
    float* data;
    int64_t floats;
  };

  static constexpr std::align_val_t kAlignment{64};

  static std::atomic<Block*> (&kept()) [kKept] {
    static std::atomic<Block*> places[kKept] = {};
    return places;
  }

  static float* allocate(int64_t floats) {
    return static_cast<float*>(::operator new(floats * sizeof(float), kAlignment));
  }

  static void free(Block* block) {
    if (block == nullptr) return;
    ::operator delete(block->data, kAlignment);
    delete block;
  }

  Block* block_ = nullptr;
};

}  // namespace deeplab_fast::cpu
