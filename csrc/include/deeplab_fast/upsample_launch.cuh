// The sequence of launches behind each upsampling op. Without torch; launch.cuh has what Launch is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "deeplab_fast/upsample.cuh"

namespace deeplab_fast::cuda {

// Labels go to `narrow` or `wide`, whichever is not null; `prob` may be null.
template <typename T, typename Launch>
void launch_argmax(const Launch& launch, const Logits<T>& logits, const TilePlan& plan,
                   uint8_t* narrow, int64_t* wide, T* prob) {
  if (plan.blocks == 0) return;
  launch(upsample_argmax_kernel<T>, Grid{plan.blocks, kTileColumns, plan.shared_bytes}, logits,
         plan, narrow, wide, prob);
}

// Adds to `matrix` [classes, classes] and `bad_labels` [1]. A table that fits into `shared_limit`
// bytes of shared memory is counted there, by at most `resident_blocks` blocks.
template <typename T, typename Launch>
void launch_confusion(const Launch& launch, const Logits<T>& logits, const TilePlan& plan,
                      const Labels& labels, int64_t shared_limit, int64_t resident_blocks,
                      unsigned long long* matrix, unsigned long long* bad_labels) {
  if (plan.blocks == 0) return;
  const int64_t table =
      static_cast<int64_t>(logits.classes) * logits.classes * sizeof(unsigned int);
  const int64_t needed = static_cast<int64_t>(plan.shared_bytes) + table;
  const bool shared_table = needed <= shared_limit;
  launch(upsample_confusion_kernel<T>,
         Grid{std::min(plan.blocks, resident_blocks), kTileColumns,
              shared_table ? static_cast<size_t>(needed) : plan.shared_bytes},
         logits, plan, labels, shared_table, matrix, bad_labels);
}

template <typename T, typename A, typename Launch>
void launch_softmax_add(const Launch& launch, const Logits<T>& logits, const TilePlan& plan,
                        const Accumulator<A>& to, bool flip) {
  if (plan.blocks == 0) return;
  launch(upsample_softmax_add_kernel<T, A>, Grid{plan.blocks, kTileColumns, plan.shared_bytes},
         logits, plan, to, flip);
}

// Fills op.sums, and op.pixel_loss and op.partial where they are not null.
template <typename T, typename Launch>
void launch_cross_entropy(const Launch& launch, const Logits<T>& logits, const CellPlan& plan,
                          const CrossEntropy<T>& op) {
  if (plan.blocks == 0) return;
  const bool smooth = op.smoothing > T(0);
  const auto kernel = op.partial != nullptr
                          ? (smooth ? upsample_cross_entropy_kernel<T, true, true>
                                    : upsample_cross_entropy_kernel<T, true, false>)
                          : (smooth ? upsample_cross_entropy_kernel<T, false, true>
                                    : upsample_cross_entropy_kernel<T, false, false>);
  launch(kernel, Grid{plan.blocks, plan.threads, sizeof(PixelMemory<T>) + plan.stage_bytes}, logits,
         plan, op);
}

// `loss` and `grad` may be null.
template <typename T, typename Launch>
void launch_finish(const Launch& launch, const BlockSums* sums, const CellPlan& plan, bool mean,
                   const T* grad, T* loss, T* scale, int64_t* bad_labels) {
  launch(finish_cross_entropy_kernel<T>, Grid{1, kFinishThreads, kFinishThreads * sizeof(double)},
         sums, plan.blocks, mean, grad, loss, scale, bad_labels);
}

template <typename T, typename Launch>
void launch_gather(const Launch& launch, const Logits<T>& logits, const CellPlan& plan,
                   const T* partial, const T* scale, Storage storage, void* out) {
  const int64_t values =
      static_cast<int64_t>(logits.images) * logits.classes * logits.rows.in * logits.columns.in;
  if (values == 0) return;
  launch(gather_gradient_kernel<T>,
         Grid{(values + kGatherThreads - 1) / kGatherThreads, kGatherThreads}, partial, scale,
         logits.images, logits.classes, logits.rows.in, logits.columns.in, plan.splits, storage,
         out);
}

}  // namespace deeplab_fast::cuda
