// Event files for Python to compare:
//   event_tool write FOLDER RESUMED_STEP LAST_STEP OFFSET   a start of a run: for each step a
//   scalar
//                                                           of step + OFFSET, and a text
//   event_tool read FILE                                    JSON, an event on each line
#include <cstdlib>
#include <iostream>
#include <string>

#include <nlohmann/json.hpp>

#include "train/event_file.h"

namespace {

void write(char** arguments) {
  const int64_t resumed_step = std::atoll(arguments[1]);
  rwkv::EventWriter writer(arguments[0], resumed_step, 1700000000);
  for (int64_t step = resumed_step + 1; step <= std::atoll(arguments[2]); ++step) {
    const double value = static_cast<double>(step) + std::atof(arguments[3]);
    writer.scalar("train/loss", step, 1700000000 + static_cast<double>(step), value);
    writer.text("sample", step, 1700000000, "<b>step</b> " + std::to_string(step) + "\n\xff");
  }
  writer.flush();
}

void read(const std::string& path) {
  rwkv::EventReader reader(path);
  while (const auto event = reader.next()) {
    nlohmann::json line = {{"step", event->step},
                           {"time", event->time_s},
                           {"version", event->file_version},
                           {"values", nlohmann::json::array()}};
    for (const rwkv::EventValue& value : event->values) {
      nlohmann::json entry = {{"tag", value.tag}};
      if (value.scalar) {
        entry["scalar"] = *value.scalar;
      }
      if (value.text) {
        entry["text"] = *value.text;
      }
      line["values"].push_back(entry);
    }
    std::cout << line.dump() << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "write" && argc == 6) {
    write(argv + 2);
  } else if (what == "read" && argc == 3) {
    read(argv[2]);
  } else {
    std::cerr << "usage: event_tool write FOLDER RESUMED_STEP LAST_STEP OFFSET | read FILE\n";
    return 2;
  }
}
