#include "train/bench/bench_startup.h"

#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <random>
#include <stdexcept>
#include <thread>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "data/atomic_file.h"
#include "data/binidx.h"
#include "train/bench/temporary_folder.h"

namespace rwkv {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kCorpusTokens = 100'000;

// A running program; killed, if it still runs, when the object goes.
class Process {
 public:
  // Its standard output is thrown away, its standard error goes to the file `log`.
  Process(std::vector<std::string> arguments, const std::string& log) : log_(log) {
    std::vector<char*> argv;
    for (std::string& argument : arguments) {
      argv.push_back(argument.data());
    }
    argv.push_back(nullptr);
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(
        &files, STDERR_FILENO, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    const int error = posix_spawn(&id_, argv[0], &files, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&files);
    if (error != 0) {
      throw std::runtime_error(arguments[0] + ": cannot be started: " + std::strerror(error));
    }
  }
  ~Process() {
    if (id_ > 0) {
      kill(id_, SIGKILL);
      waitpid(id_, nullptr, 0);
    }
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  // False while it runs. Throws if it failed.
  bool has_ended() { return ended(WNOHANG); }
  void wait() { ended(0); }

 private:
  bool ended(int options) {
    int status = 0;
    if (waitpid(id_, &status, options) != id_) {
      return false;
    }
    id_ = -1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      throw std::runtime_error("the program to be timed failed; it wrote\n" + read_text_file(log_));
    }
    return true;
  }

  pid_t id_ = -1;
  std::string log_;
};

void write_corpus(const std::string& prefix) {
  std::mt19937_64 random(1);
  std::vector<int32_t> ids(kCorpusTokens);
  for (int32_t& id : ids) {
    id = static_cast<int32_t>(random() % 256);
  }
  BinidxWriter writer(prefix, {.identity = "bytes", .vocab_size = 256, .end_of_document = 0});
  writer.add_tokens(ids);
  writer.end_document();
  writer.finish(kCorpusTokens);
}

std::vector<std::string> training(const std::string& program, const TemporaryFolder& folder) {
  AtomicFile config(folder / "run.toml");
  config.write(
      "[model]\nversion = \"rwkv4\"\nn_layer = 6\nn_embd = 384\nctx_len = 256\n[data]\n"
      "[train]\nbatch_size = 8\ntotal_steps = 1000\nsave_every_steps = 1000\n"
      "[schedule]\nlr_init = 1e-4\nlr_final = 1e-5\n");
  config.commit();
  return {program,
          "train",
          "--config",
          folder / "run.toml",
          "--set",
          "data.train=" + folder / "corpus",
          "--set",
          "train.run_dir=" + folder / "run"};
}

// From the start of the program until `file` holds something; then it is killed.
double milliseconds_until_written(const std::vector<std::string>& arguments,
                                  const std::string& file,
                                  const std::string& log) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  Process process(arguments, log);
  std::error_code missing;
  while (!(fs::file_size(file, missing) > 0 && !missing)) {
    if (process.has_ended()) {
      throw std::runtime_error("the program to be timed ended without writing " + file);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

}  // namespace

std::vector<BenchRow> bench_startup(const std::string& program, int64_t repeats) {
  const TemporaryFolder folder;
  const std::string log = folder / "log";
  const Spread help = time_repeated(1, repeats, [&] { Process({program, "--help"}, log).wait(); });

  write_corpus(folder / "corpus");
  const std::vector<std::string> arguments = training(program, folder);
  std::vector<double> times;
  for (int64_t i = 0; i <= repeats; ++i) {
    fs::remove_all(folder / "run");
    times.push_back(milliseconds_until_written(arguments, folder / "run/metrics.jsonl", log));
  }
  times.erase(times.begin());
  return {{.what = "rookery --help", .ms = help, .figures = {}},
          {.what = "rookery train to its first step, S fp32",
           .ms = spread_of(std::move(times)),
           .figures = {}}};
}

}  // namespace rwkv
