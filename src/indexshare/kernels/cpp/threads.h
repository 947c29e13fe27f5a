// One pool of threads, torch's own: its operators and these kernels never compete. Tasks are handed out one by one, so that
// an unequal or disturbed thread holds nobody up; no result depends on which thread ran a task.
//
// Layers have a hundred short parallel stretches for each token. A `Team` holds torch's threads for all of them: the first
// runs the program and publishes each stretch, the others wait for it, spinning. A thread that the system has taken away is
// not waited for unless it holds a task.
#pragma once

#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

constexpr int kSpins = 4000;  // before a waiting thread lets others run

inline void pause_briefly(int& spins) {
  if (++spins < kSpins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    sched_yield();
  }
}

class Team {
 public:
  // Runs `program` on the calling thread, in which for_each_task uses the team.
  template <typename F>
  static void lead(const F& program) {
    const int64_t num_threads = torch::stable::get_num_threads();
    if (num_threads == 1 || current() != nullptr) return program();
    Team team;
    torch::stable::parallel_for(0, num_threads, 1, [&](int64_t first, int64_t) {
      if (first != 0) return team.follow();
      const Leading leading(team);  // its end sends the others home, also when the program throws
      program();
    });
  }

  struct Leading {
    explicit Leading(Team& team) : team(team) { current() = &team; }
    ~Leading() { current() = nullptr, team.is_done_ = true; }
    Team& team;
  };

  static Team*& current() {
    static thread_local Team* team = nullptr;
    return team;
  }

  using Function = void (*)(const void* context, int64_t task);

  void run(int64_t count, Function function, const void* context) {
    function_ = function, context_ = context, count_ = count;
    next_.store(0, std::memory_order_relaxed);
    const Stretch stretch(*this);
    work(function, context, count);
  }

 private:
  // Open while it lives; at its end all have left, also when a task throws.
  struct Stretch {
    explicit Stretch(Team& team) : team(team) { team.stretch_.fetch_add(1); }  // odd: open
    ~Stretch() {
      team.next_ = team.count_;
      team.stretch_.fetch_add(1);  // closed: who has not counted himself in by now does not come in any more
      for (int spins = 0; team.num_inside_.load() != 0;) pause_briefly(spins);
    }
    Team& team;
  };

  struct Inside {
    explicit Inside(Team& team) : team(team) { team.num_inside_.fetch_add(1); }
    ~Inside() { team.num_inside_.fetch_sub(1); }
    Team& team;
  };

  void work(Function function, const void* context, int64_t count) {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < count;) function(context, task);
  }

  void follow() {
    uint64_t seen = 0;
    for (int spins = 0; !is_done_.load();) {
      const uint64_t now = stretch_.load();
      if (now == seen || now % 2 == 0) {
        pause_briefly(spins);
        continue;
      }
      {
        const Inside inside(*this);
        if (stretch_.load() == now) work(function_, context_, count_);
      }
      seen = now, spins = 0;
    }
  }

  std::atomic<uint64_t> stretch_{0};
  std::atomic<int> num_inside_{0};
  std::atomic<bool> is_done_{false};
  alignas(64) std::atomic<int64_t> next_{0};
  Function function_ = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0;
};

// f(task) for every task below `count`.
template <typename F>
void for_each_task(int64_t count, const F& f) {
  if (count <= 1) {
    if (count == 1) f(int64_t{0});
    return;
  }
  auto call = [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); };
  if (Team* team = Team::current()) return team->run(count, call, &f);
  Team::lead([&] {
    if (Team* team = Team::current()) return team->run(count, call, &f);
    for (int64_t task = 0; task < count; task++) f(task);
  });
}

// f(begin, end) for runs of at most `size` of the numbers below `count`.
template <typename F>
void for_each_run(int64_t count, int64_t size, const F& f) {
  for_each_task((count + size - 1) / size, [&](int64_t task) { f(task * size, std::min(count, (task + 1) * size)); });
}

}  // namespace
