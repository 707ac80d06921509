#include "train/bench/bench.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <stdexcept>

#include <nlohmann/json.hpp>
#include <sys/wait.h>
#include <unistd.h>

namespace rwkv {
namespace {

nlohmann::ordered_json to_json(const BenchRow& row) {
  nlohmann::ordered_json object{{"what", row.what},
                                {"median_ms", row.ms.median},
                                {"min_ms", row.ms.min},
                                {"max_ms", row.ms.max},
                                {"repeats", row.ms.repeats},
                                {"conditions", nlohmann::ordered_json::object()},
                                {"parts", nlohmann::ordered_json::array()}};
  for (const auto& [name, value] : row.conditions) {
    object["conditions"][name] = value;
  }
  for (const BenchRow& part : row.parts) {
    object["parts"].push_back(to_json(part));
  }
  for (const auto& [name, value] : row.figures) {
    object[name] = value;
  }
  return object;
}

BenchRow from_json(const nlohmann::ordered_json& object) {
  BenchRow row{.what = object.at("what"),
               .ms = {.median = object.at("median_ms"),
                      .min = object.at("min_ms"),
                      .max = object.at("max_ms"),
                      .repeats = object.at("repeats")},
               .figures = {}};
  for (const auto& item : object.at("conditions").items()) {
    row.conditions.emplace_back(item.key(), item.value());
  }
  for (const auto& part : object.at("parts")) {
    row.parts.push_back(from_json(part));
  }
  size_t index = 0;
  for (const auto& item : object.items()) {
    if (index++ >= 7) {
      row.figures.emplace_back(item.key(), item.value());
    }
  }
  return row;
}

// Three significant digits, or all of a larger number.
std::string format_figure(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), value < 100 ? "%.3g" : "%.0f", value);
  return text.data();
}

std::string format_spread(const Spread& ms) {
  return format_figure(ms.median) + " [" + format_figure(ms.min) + "-" + format_figure(ms.max) +
         "]";
}

std::string read_all(int descriptor) {
  std::string text;
  std::array<char, 4096> buffer;
  for (ssize_t count; (count = read(descriptor, buffer.data(), buffer.size())) > 0;) {
    text.append(buffer.data(), static_cast<size_t>(count));
  }
  return text;
}

void write_all(int descriptor, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = write(descriptor, text.data(), text.size());
    if (count <= 0) {
      throw std::runtime_error("a benchmark's rows cannot be handed over; was the program killed?");
    }
    text.remove_prefix(static_cast<size_t>(count));
  }
}

// In the process of a benchmark: sends its rows, or the text of what it threw. Returns the exit
// code.
int hand_over_rows(const std::function<std::vector<BenchRow>()>& work, int descriptor) {
  try {
    write_all(descriptor, rows_to_json(work()));
    return 0;
  } catch (const c10::Error& error) {
    write_all(descriptor, error.what_without_backtrace());
  } catch (const std::exception& error) {
    write_all(descriptor, error.what());
  }
  return 1;
}

}  // namespace

Spread spread_of(std::vector<double> milliseconds) {
  std::sort(milliseconds.begin(), milliseconds.end());
  const size_t half = milliseconds.size() / 2;
  return {.median = milliseconds.size() % 2 == 1
                        ? milliseconds[half]
                        : (milliseconds[half - 1] + milliseconds[half]) / 2,
          .min = milliseconds.front(),
          .max = milliseconds.back(),
          .repeats = static_cast<int64_t>(milliseconds.size())};
}

double milliseconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

Spread time_repeated(int64_t warm_up, int64_t repeats, const std::function<void()>& work) {
  for (int64_t i = 0; i < warm_up; ++i) {
    work();
  }
  std::vector<double> times;
  for (int64_t i = 0; i < repeats; ++i) {
    times.push_back(milliseconds_of(work));
  }
  return spread_of(std::move(times));
}

std::string format_rows(const std::vector<BenchRow>& rows) {
  // Cells of the header, then of each row.
  std::vector<std::vector<std::string>> table{{"", "ms, median [min-max]"}};
  for (const auto& figure : rows.front().figures) {
    table.front().push_back(figure.first);
  }
  for (const BenchRow& row : rows) {
    table.push_back({row.what, format_spread(row.ms)});
    for (const auto& figure : row.figures) {
      table.back().push_back(format_figure(figure.second));
    }
  }
  std::vector<size_t> widths;
  for (const auto& cells : table) {
    widths.resize(std::max(widths.size(), cells.size()));
    for (size_t i = 0; i < cells.size(); ++i) {
      widths[i] = std::max(widths[i], cells[i].size());
    }
  }
  std::string text;
  for (const auto& cells : table) {
    for (size_t i = 0; i < cells.size(); ++i) {
      const std::string padding(widths[i] - cells[i].size(), ' ');
      text += i == 0 ? cells[i] + padding : "  " + padding + cells[i];
    }
    text += '\n';
  }
  for (const BenchRow& row : rows) {
    if (!row.parts.empty()) {
      text += "\n" + row.what + ":\n" + format_rows(row.parts);
    }
  }
  return text;
}

std::string rows_to_json(const std::vector<BenchRow>& rows) {
  nlohmann::ordered_json array = nlohmann::ordered_json::array();
  for (const BenchRow& row : rows) {
    array.push_back(to_json(row));
  }
  return array.dump(2) + "\n";
}

std::vector<BenchRow> in_own_process(const std::function<std::vector<BenchRow>()>& work) {
  std::array<int, 2> ends{};
  if (pipe(ends.data()) != 0) {
    throw std::runtime_error("a benchmark's pipe cannot be made; are too many files open?");
  }
  std::cout.flush();
  const pid_t child = fork();
  if (child < 0) {
    throw std::runtime_error("a benchmark's process cannot be started; is memory short?");
  }
  if (child == 0) {
    close(ends[0]);
    // Without destructors and buffers, which are the parent's.
    _exit(hand_over_rows(work, ends[1]));
  }
  close(ends[1]);
  const std::string text = read_all(ends[0]);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    throw std::runtime_error(text.empty() ? "a benchmark's process was killed; is memory short?"
                                          : text);
  }
  std::vector<BenchRow> rows;
  for (const auto& object : nlohmann::ordered_json::parse(text)) {
    rows.push_back(from_json(object));
  }
  return rows;
}

}  // namespace rwkv
