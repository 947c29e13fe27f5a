// One pool of threads, torch's own: its operators and these kernels never compete. Tasks are handed out one by one, so that
// an unequal or disturbed thread holds nobody up; no result depends on which thread ran a task.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace {

// f(task) for every task below `count`.
template <typename F>
void for_each_task(int64_t count, const F& f) {
  if (count <= 1) {
    if (count == 1) f(int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t num_threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(task);
  });
}

// f(begin, end) for runs of at most `size` of the numbers below `count`.
template <typename F>
void for_each_run(int64_t count, int64_t size, const F& f) {
  for_each_task((count + size - 1) / size, [&](int64_t task) { f(task * size, std::min(count, (task + 1) * size)); });
}

}  // namespace
