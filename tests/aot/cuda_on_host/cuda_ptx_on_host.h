// Runs CUDA kernels that are written with deeplab_fast/ptx.cuh on the host, by giving each of its
// functions its documented meaning. For tests: it checks what a kernel computes and how it
// synchronises, not how fast.
//
// The threads of a cluster run as fibres, in an order drawn at random, and switch at everything
// that waits. What the hardware does by itself (copies, wgmma) is done at a time drawn at random
// between its issue and the moment that a wait for it ends, or always as late, or as early, as that
// allows: an operand that is overwritten or read too soon shows in the result. Also errors: a wait
// that nothing can end, lanes or warpgroups that diverge, more arrivals than a barrier has, reads
// of global memory outside the operands, shared memory outside the block's, wgmma on what a thread
// copied without a fence between. Shared memory and outputs begin as NaN.
//
// Not modelled: memory order finer than that, banks, registers, instruction syntax.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "deeplab_fast/ptx.cuh"
#include "elements_on_host.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

using std::size_t;

struct Index {
  unsigned int x;
};
inline Index threadIdx, blockIdx;

struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace cuda_on_host {

// When asynchronous work is done.
enum class Timing { kRandom, kLate, kEarly };

inline void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint32_t below(uint32_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>((state_ >> 32) * n >> 32);
  }

 private:
  uint64_t state_;
};

// An mbarrier.
struct Barrier {
  int count = 0;
  int pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void settle() {
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = count;
    }
  }
  void arrive() {
    require(pending > 0, "an arrival that the barrier does not expect");
    --pending;
    settle();
  }
};

// What a thread has asked for and not waited for: a copy, the end of a group of copies, or an
// arrival once what is before it has landed.
struct Copy {
  enum Kind { kCopy, kGroup, kArrive } kind;
  uint32_t to = 0;
  const void* from = nullptr;
  bool real = false;
};

// A thread's part of a wgmma, or the end of a group of them.
struct Product {
  bool group;
  std::function<void()> run;
};

struct Thread {
  ucontext_t context;
  jmp_buf resume;
  std::vector<char> stack;
  bool started, finished;
  int block, index;
  // Not null: what must come before the thread goes on.
  std::function<bool()> ready;
  std::deque<Copy> copies;
  std::deque<Product> products;
  bool fenced;
  uint64_t products_hash;
};

struct Meeting {
  size_t arrived = 0;
  uint64_t generation = 0;
  int what = 0;
  const void* in[32];
  void* out[32];
};

struct Block {
  std::vector<unsigned char> shared;
  std::map<uint32_t, Barrier> barriers;
  Meeting all;
  std::vector<Meeting> warps;
  size_t running = 0;
};

// A copy by the engine.
struct Box {
  std::function<void()> run;
};

struct Range {
  const unsigned char* begin;
  const unsigned char* end;
};

// Where dynamic shared memory begins: not at a multiple of what kernels align to.
constexpr uint32_t kSharedBase = 1024 + 16;

struct Machine {
  Timing timing = Timing::kRandom;
  Random random{1};
  std::vector<Range> readable;
  std::vector<Thread> threads;
  std::vector<Block> blocks;
  Meeting cluster;
  std::vector<Box> boxes;
  std::function<void()> body;
  jmp_buf scheduler;
  size_t running = 0;
  std::string error;
};
inline Machine machine;

inline Thread& self() { return machine.threads[machine.running]; }
inline Block& block() { return machine.blocks[self().block]; }

// A pointer into the shared memory of a block.
inline unsigned char* shared_at(Block& of, uint32_t address, size_t bytes) {
  require(of.running > 0, "an access to the shared memory of a block that has ended");
  require(address >= kSharedBase && address - kSharedBase + bytes <= of.shared.size(),
          "an access outside the shared memory");
  return of.shared.data() + (address - kSharedBase);
}

inline void write_shared(Block& of, uint32_t to, const void* from, size_t bytes) {
  const auto next = of.barriers.lower_bound(to);
  require(next == of.barriers.end() || next->first >= to + bytes, "a copy onto a barrier");
  unsigned char* place = shared_at(of, to, bytes);
  if (from == nullptr) {
    std::memset(place, 0, bytes);
  } else {
    std::memcpy(place, from, bytes);
  }
}

inline const void* global_at(const void* from, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(from);
  for (const Range& range : machine.readable) {
    if (p >= range.begin && p + bytes <= range.end) return from;
  }
  throw std::runtime_error("a copy from outside the operands");
}

inline Barrier& barrier_at(Block& of, uint32_t address) {
  require(of.running > 0, "an access to a barrier of a block that has ended");
  const auto found = of.barriers.find(address);
  require(found != of.barriers.end(), "a barrier that was not initialised");
  return found->second;
}

inline void enter() {
  try {
    machine.body();
  } catch (const std::exception& caught) {
    machine.error = caught.what();
  }
  self().finished = true;
  --block().running;
  _longjmp(machine.scheduler, 1);
}

// From the scheduler to a thread, until it waits.
[[gnu::noinline]] inline void resume(Thread& thread) {
  threadIdx.x = static_cast<unsigned int>(thread.index);
  if (_setjmp(machine.scheduler)) return;
  if (!thread.started) {
    thread.started = true;
    setcontext(&thread.context);
  }
  _longjmp(thread.resume, 1);
}

[[gnu::noinline]] inline void suspend() {
  if (!_setjmp(self().resume)) _longjmp(machine.scheduler, 1);
}

inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  self().ready = std::move(ready);
  const unsigned int here = blockIdx.x;
  suspend();
  blockIdx.x = here;
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
}

// `count` threads give and take data; the last computes.
inline void meet(Meeting& meeting, size_t count, int what, size_t place, const void* in, void* out,
                 const std::function<void(Meeting&)>& compute) {
  require(meeting.arrived == 0 || meeting.what == what, "lanes that do not do the same");
  meeting.what = what;
  if (place < 32) {
    meeting.in[place] = in;
    meeting.out[place] = out;
  }
  if (++meeting.arrived == count) {
    if (compute) compute(meeting);
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  wait_until([&meeting, before = meeting.generation] { return meeting.generation != before; });
}

inline Meeting& warp() { return block().warps[self().index / 32]; }

template <typename In, typename Out>
void warp_together(int what, const In& in, Out& out, const std::function<void(Meeting&)>& compute) {
  meet(warp(), 32, what, self().index % 32, &in, &out, compute);
}

// Does a thread's oldest copies up to the first arrival, or all; at most `groups` groups.
inline void land(Thread& thread, size_t groups = ~size_t{0}) {
  while (!thread.copies.empty() && groups > 0) {
    const Copy copy = thread.copies.front();
    thread.copies.pop_front();
    Block& of = machine.blocks[thread.block];
    if (copy.kind == Copy::kCopy) {
      write_shared(of, copy.to, copy.real ? global_at(copy.from, 16) : nullptr, 16);
    } else if (copy.kind == Copy::kGroup) {
      --groups;
    } else {
      barrier_at(of, copy.to).arrive();
      return;
    }
  }
}

inline void run_box() {
  const size_t i = machine.random.below(static_cast<uint32_t>(machine.boxes.size()));
  const Box box = machine.boxes[i];
  machine.boxes.erase(machine.boxes.begin() + static_cast<int64_t>(i));
  box.run();
}

// One piece of asynchronous work; false where there is none.
inline bool work() {
  std::vector<Thread*> busy;
  for (Thread& thread : machine.threads) {
    if (!thread.copies.empty()) busy.push_back(&thread);
  }
  const size_t choices = busy.size() + machine.boxes.size();
  if (choices == 0) return false;
  const size_t i = machine.random.below(static_cast<uint32_t>(choices));
  if (i < busy.size()) {
    land(*busy[i]);
  } else {
    run_box();
  }
  return true;
}

inline void schedule() {
  const size_t count = machine.threads.size();
  while (true) {
    bool finished = true, advanced = false;
    const size_t first = machine.random.below(static_cast<uint32_t>(count));
    const bool backwards = machine.random.below(2) != 0;
    for (size_t i = 0; i < count; ++i) {
      Thread& thread = machine.threads[(first + (backwards ? count - i : i)) % count];
      if (thread.finished) continue;
      finished = false;
      if (thread.ready && !thread.ready()) continue;
      // Some threads fall behind.
      if (machine.random.below(8) == 0) {
        advanced = true;
        continue;
      }
      thread.ready = nullptr;
      machine.running = static_cast<size_t>(&thread - machine.threads.data());
      resume(thread);
      if (!machine.error.empty()) throw std::runtime_error(machine.error);
      advanced = true;
    }
    if (finished) break;
    if (machine.timing == Timing::kEarly) {
      while (work()) advanced = true;
    } else if (machine.timing == Timing::kRandom) {
      for (uint32_t n = machine.random.below(64); n > 0 && work(); --n) advanced = true;
    }
    if (!advanced && !work()) throw std::runtime_error("a wait that nothing can end");
  }
  while (work()) {
  }
}

inline void run_cluster(size_t first_block, size_t blocks, size_t threads, size_t shared_bytes,
                        const std::function<void()>& body) {
  machine.error.clear();
  machine.cluster = {};
  machine.boxes.clear();
  machine.blocks.assign(blocks, {});
  for (Block& of : machine.blocks) {
    of.shared.assign(shared_bytes, 0xff);
    of.warps.resize((threads + 31) / 32);
    of.running = threads;
  }
  machine.body = [&body, first_block] {
    blockIdx.x = static_cast<unsigned int>(first_block + self().block);
    body();
  };
  machine.threads.resize(blocks * threads);
  for (size_t i = 0; i < machine.threads.size(); ++i) {
    Thread& thread = machine.threads[i];
    thread.started = thread.finished = false;
    thread.block = static_cast<int>(i / threads);
    thread.index = static_cast<int>(i % threads);
    thread.ready = nullptr;
    thread.copies.clear();
    thread.products.clear();
    thread.fenced = true;
    thread.products_hash = 0;
    thread.stack.resize(64 * 1024);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  schedule();
  for (size_t i = 0; i < machine.threads.size(); ++i) {
    const Thread& thread = machine.threads[i];
    const Thread& leader = machine.threads[i / 128 * 128];
    require(threads % 128 != 0 || thread.products_hash == leader.products_hash,
            "a warpgroup whose threads issued different products");
    require(thread.products.empty(), "a thread that ends before its products");
  }
}

// Grid is what a launch takes: blocks, threads, shared memory and blocks of a cluster.
struct Launch {
  template <typename... Parameters, typename Grid, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), const Grid& grid,
                  const Arguments&... arguments) const {
    const std::function<void()> body = [&] { kernel(arguments...); };
    const auto cluster = static_cast<size_t>(grid.cluster);
    require(grid.blocks % grid.cluster == 0, "a cluster that is not whole");
    for (size_t first = 0; first < static_cast<size_t>(grid.blocks); first += cluster) {
      run_cluster(first, cluster, static_cast<size_t>(grid.threads), grid.shared_bytes, body);
    }
  }
};

// Row `r` of an operand of wgmma, by its description: rows of 128 bytes, swizzled.
template <typename T>
void operand_row(Block& of, uint64_t description, int r, float (&to)[16]) {
  const auto start = static_cast<uint32_t>(description & 0x3fff) << 4;
  const auto eight_rows = static_cast<uint32_t>(description >> 32 & 0x3fff) << 4;
  require(description >> 62 == 1 && (description >> 49 & 7) == 0 && start % 1024 < 128,
          "a description of an operand that the test does not know");
  for (int word = 0; word < 2; ++word) {
    uint32_t address = start + r / 8 * eight_rows + r % 8 * 128 + 16 * word;
    address ^= (address >> 7 & 7) << 4;
    uint16_t elements[8];
    std::memcpy(elements, shared_at(of, address, 16), 16);
    for (int i = 0; i < 8; ++i) to[8 * word + i] = Element<T>::widen(elements[i]);
  }
}

// A thread's part of d [64, 8 blocks] = a b^T (+ d).
template <typename T>
void multiply(Block& of, int thread, float* d, int blocks, uint64_t a, uint64_t b, bool add) {
  const int g = thread % 32 / 4, t = thread % 4;
  float rows[2][16];
  for (int half = 0; half < 2; ++half) {
    operand_row<T>(of, a, thread / 32 % 4 * 16 + g + 8 * half, rows[half]);
  }
  for (int i = 0; i < blocks; ++i) {
    for (int j = 0; j < 2; ++j) {
      float filter[16], sum[2] = {};
      operand_row<T>(of, b, 8 * i + 2 * t + j, filter);
      for (int k = 0; k < 16; ++k) {
        for (int half = 0; half < 2; ++half) sum[half] += rows[half][k] * filter[k];
      }
      for (int half = 0; half < 2; ++half) {
        float& to = d[4 * i + 2 * half + j];
        to = add ? to + sum[half] : sum[half];
      }
    }
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  using namespace cuda_on_host;
  const size_t threads = machine.threads.size() / machine.blocks.size();
  meet(block().all, threads, 0, 32, nullptr, nullptr, nullptr);
}

namespace deeplab_fast::cuda::ptx {

namespace host = cuda_on_host;

// The copy engine's description of a matrix of 16-bit elements and the boxes that it copies.
struct TensorMap {
  const uint16_t* data;
  int64_t columns, rows, pitch;
  int box_columns, box_rows;
};

inline uint32_t dynamic_shared() { return host::kSharedBase; }

inline uint32_t shuffle_xor(uint32_t value, int lanes) {
  uint32_t result = 0;
  host::warp_together(100 + lanes, value, result, [lanes](host::Meeting& meeting) {
    for (int i = 0; i < 32; ++i) {
      *static_cast<uint32_t*>(meeting.out[i]) =
          *static_cast<const uint32_t*>(meeting.in[i ^ lanes]);
    }
  });
  return result;
}

inline void copy_async(uint32_t to, const void* from, bool real) {
  host::self().copies.push_back({host::Copy::kCopy, to, from, real});
}

inline void copy_commit() { host::self().copies.push_back({host::Copy::kGroup}); }

template <int kPending>
void copy_wait() {
  size_t groups = 0;
  for (const host::Copy& copy : host::self().copies) groups += copy.kind == host::Copy::kGroup;
  if (groups > kPending) host::land(host::self(), groups - kPending);
}

inline void load_matrices(uint32_t (&to)[4], uint32_t from) {
  host::Block& of = host::block();
  host::warp_together(1, from, to, [&of](host::Meeting& meeting) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = *static_cast<const uint32_t*>(meeting.in[8 * matrix + row]);
        host::require(address % 16 == 0, "ldmatrix from an odd address");
        const unsigned char* p = host::shared_at(of, address, 16);
        for (int t = 0; t < 4; ++t) {
          std::memcpy(static_cast<uint32_t*>(meeting.out[4 * row + t]) + matrix, p + 4 * t, 4);
        }
      }
    }
  });
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t operands[6] = {a[0], a[1], a[2], a[3], b0, b1};
  host::warp_together(2, operands, d, [](host::Meeting& meeting) {
    float rows[16][16], columns[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* word = static_cast<const uint32_t*>(meeting.in[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 6; ++i) {
        for (int j = 0; j < 2; ++j) {
          const float value = host::Element<T>::widen(static_cast<uint16_t>(word[i] >> 16 * j));
          if (i < 4) {
            rows[g + 8 * (i % 2)][2 * t + j + 8 * (i / 2)] = value;
          } else {
            columns[g][2 * t + j + 8 * (i - 4)] = value;
          }
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<float*>(meeting.out[lane]);
      for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
          sum += rows[lane / 4 + 8 * (i / 2)][k] * columns[lane % 4 * 2 + i % 2][k];
        }
        to[i] += sum;
      }
    }
  });
}

inline void barrier_init(uint32_t barrier, int count) {
  host::require(barrier % 8 == 0, "a barrier at an odd address");
  host::shared_at(host::block(), barrier, 8);
  host::block().barriers[barrier] = {count, count};
}

inline void barrier_init_fence() {}

inline void barrier_arrive(uint32_t barrier) { host::barrier_at(host::block(), barrier).arrive(); }

inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  host::barrier_at(host::machine.blocks.at(rank), barrier).arrive();
}

inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  host::Barrier& at = host::barrier_at(host::block(), barrier);
  at.bytes += bytes;
  at.arrive();
}

inline void barrier_arrive_copies(uint32_t barrier) {
  host::self().copies.push_back({host::Copy::kArrive, barrier});
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  const host::Barrier& at = host::barrier_at(host::block(), barrier);
  host::wait_until([&at, parity] { return (at.phase & 1) != parity; });
  host::self().fenced = false;
}

inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  barrier_wait(barrier, parity);
}

inline void prefetch(const TensorMap*) {}

inline void load_box_multicast(uint32_t to, const TensorMap* map, int column, int row,
                               uint32_t barrier, uint16_t blocks) {
  host::require(to % 1024 == 0, "a swizzled box at an odd address");
  const auto run = [=, map = *map] {
    for (size_t rank = 0; rank < host::machine.blocks.size(); ++rank) {
      if (!(blocks >> rank & 1)) continue;
      host::Block& of = host::machine.blocks[rank];
      for (int r = 0; r < map.box_rows; ++r) {
        for (int c = 0; c < map.box_columns; ++c) {
          uint32_t address = to + 2 * (r * map.box_columns + c);
          address ^= (address >> 7 & 7) << 4;
          const bool inside = row + r < map.rows && column + c < map.columns;
          const uint16_t* from = map.data + (row + r) * map.pitch + column + c;
          host::write_shared(of, address, inside ? host::global_at(from, 2) : nullptr, 2);
        }
      }
      host::Barrier& at = host::barrier_at(of, barrier);
      at.bytes -= 2 * map.box_rows * map.box_columns;
      at.settle();
    }
  };
  host::machine.boxes.push_back({run});
}

inline void load_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier) {
  load_box_multicast(to, map, column, row, barrier, static_cast<uint16_t>(1 << host::self().block));
}

inline void fence_async_proxy() { host::self().fenced = true; }

inline uint32_t cluster_rank() { return static_cast<uint32_t>(host::self().block); }

inline void cluster_sync() {
  host::meet(host::machine.cluster, host::machine.threads.size(), 0, 32, nullptr, nullptr, nullptr);
}

template <int kRegisters>
void give_registers() {}

template <int kRegisters>
void take_registers() {}

template <int kBlocks>
void wgmma_hold(float (&)[kBlocks][4]) {}

inline void wgmma_fence() {}

template <typename T, int kBlocks>
void wgmma(float (&d)[kBlocks][4], uint64_t a, uint64_t b, bool add) {
  host::Thread& thread = host::self();
  host::require(thread.fenced, "wgmma without a fence after a wait");
  thread.products_hash = (thread.products_hash ^ a ^ b << 7 ^ (add ? 1 : 0)) * 0x100000001b3ull;
  const auto run = [=, &of = host::block(), index = thread.index, to = &d[0][0]] {
    host::multiply<T>(of, index, to, kBlocks, a, b, add);
  };
  if (host::machine.timing == host::Timing::kEarly) {
    run();
  } else {
    thread.products.push_back({false, run});
  }
}

inline void wgmma_commit() { host::self().products.push_back({true, nullptr}); }

template <int kPending>
void wgmma_wait() {
  host::Thread& thread = host::self();
  size_t groups = 0;
  for (const host::Product& product : thread.products) groups += product.group;
  while (groups > kPending) {
    const host::Product product = thread.products.front();
    thread.products.pop_front();
    if (product.group) {
      --groups;
    } else {
      product.run();
    }
  }
  // The instruction is one of a whole warp.
  host::meet(host::warp(), 32, 3, 32, nullptr, nullptr, nullptr);
}

}  // namespace deeplab_fast::cuda::ptx
