#include "train/run_main.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

#include <cxxopts.hpp>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include "data/mapping_guard.h"
#include "data/utf8.h"

namespace rwkv {
namespace {

constexpr const char* kMemoryHint =
    "out of memory; in training a smaller train.micro_batch_size or model.ctx_len needs less";

// Texts quote from files, and some libraries quote raw bytes: a terminal must not get to see what
// it would obey.
std::string printable(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const auto byte = static_cast<unsigned char>(text[0]);
    const size_t length = byte == '\n' ? 1 : shown_char_length(text);
    if (length == 0) {
      result.append("\\x").append(1, "0123456789abcdef"[byte >> 4]);
      result.append(1, "0123456789abcdef"[byte & 15]);
    } else {
      result.append(text.substr(0, length));
    }
    text.remove_prefix(std::max(length, size_t{1}));
  }
  return result;
}

int report(int code, std::string_view text) {
  std::cerr << "rookery: " << printable(text) << '\n';
  return code;
}

// What a command printed is its result: a full disk must not look like success.
void flush_result() {
  std::cout.flush();
  if (!std::cout || std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    throw std::runtime_error("the result cannot be written to standard output; is the disk full?");
  }
}

}  // namespace

int run_main(const std::function<int()>& command) {
  spdlog::set_default_logger(spdlog::stderr_color_mt("rookery"));
  spdlog::set_pattern("%H:%M:%S %v");
  // A file that may not grow is then an error of the write, with a text, and not the end.
  std::signal(SIGXFSZ, SIG_IGN);
  report_shrunk_mappings();
  try {
    const int code = command();
    flush_result();
    return code;
  } catch (const cxxopts::exceptions::exception& error) {
    return report(kExitUsage, std::string(error.what()) + "; --help lists the options");
  } catch (const std::invalid_argument& error) {
    return report(kExitUsage, error.what());
  } catch (const std::bad_alloc&) {
    return report(kExitFailed, kMemoryHint);
  } catch (const OutOfMemory& error) {
    return report(kExitFailed, std::string(kMemoryHint) + ": " + error.what());
  } catch (const BugError& error) {
    return report(kExitBug, "a bug in rookery: " + std::string(error.what()));
  } catch (const std::filesystem::filesystem_error& error) {
    return report(kExitFailed,
                  error.path1().string() + ": " + error.code().message() +
                      "; are it and its folder readable, and writable where they are written to?");
  } catch (const std::exception& error) {
    return report(kExitFailed, error.what());
  }
}

}  // namespace rwkv
