// A test program: runs named cases, says which failed, and how many there were.
//
//   program [--list] [--fail-fast] [--shard i/n] [PREFIX]    every nth case whose name begins so
#pragma once

#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace harness {

constexpr unsigned kSecondsPerCase = 60;

// Ends the program when its time is up, whatever the kernels' threads are doing.
class TimeLimit {
 public:
  explicit TimeLimit(unsigned seconds) {
    signal(SIGALRM, [](int) {
      constexpr char message[] = "simt: the case took too long\n";
      [[maybe_unused]] const auto written = write(STDERR_FILENO, message, sizeof message - 1);
      _exit(4);
    });
    alarm(seconds);
  }
  ~TimeLimit() { alarm(0); }
};

// A number from a name, so that a case has its data whichever other cases run.
inline uint64_t seed_of(const std::string& name) {
  uint64_t hash = 14695981039346656037u;
  for (const char c : name) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  }
  return hash;
}

class Program {
 public:
  Program(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], "--list") == 0) {
        list_ = true;
      } else if (std::strcmp(argv[i], "--fail-fast") == 0) {
        fail_fast_ = true;
      } else if (std::strcmp(argv[i], "--shard") == 0 && i + 1 < argc) {
        std::sscanf(argv[++i], "%u/%u", &shard_, &shards_);
      } else {
        prefix_ = argv[i];
      }
    }
  }

  // Runs body(seed) if the case is asked for.
  template <class Body>
  void test(const std::string& name, Body body) {
    if (!name.starts_with(prefix_) || matching_++ % shards_ != shard_) {
      return;
    }
    name_ = name, failed_ = false;
    ++cases_;
    if (list_) {
      std::printf("%s\n", name.c_str());
      return;
    }
    const TimeLimit limit(kSecondsPerCase);
    body(seed_of(name));
    failures_ += failed_;
    if (failed_ && fail_fast_) {
      std::fflush(nullptr);
      _exit(1);
    }
  }

  // The first thing wrong in a case is printed.
  __attribute__((format(printf, 3, 4))) bool expect(bool right, const char* format, ...) {
    if (!right && !failed_) {
      failed_ = true;
      std::printf("wrong value in %s: ", name_.c_str());
      std::va_list arguments;
      va_start(arguments, format);
      std::vprintf(format, arguments);
      va_end(arguments);
      std::printf("\n");
      std::fflush(stdout);
    }
    return right;
  }

  int finish() const {
    std::printf("%u cases, %u failed\n", cases_, failures_);
    return cases_ > 0 && failures_ == 0 ? 0 : 1;
  }

 private:
  std::string prefix_, name_;
  unsigned shard_ = 0, shards_ = 1, matching_ = 0, cases_ = 0, failures_ = 0;
  bool list_ = false, fail_fast_ = false, failed_ = false;
};

}  // namespace harness
