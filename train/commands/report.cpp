#include <iostream>
#include <vector>

#include "data/atomic_file.h"
#include "train/commands/commands.h"
#include "train/report/report_page.h"

namespace rwkv {
namespace {

constexpr const char* kExample = "rookery report runs/mine --output mine.html";

}  // namespace

int report_command(int argc, char** argv) {
  cxxopts::Options options("rookery report",
                           "Writes a page on a run, or on several side by side: curves, samples,\n"
                           "configuration, environment. One HTML file that needs no network.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("runs", "folder of a run; several are compared", cxxopts::value<std::vector<std::string>>());
  add("output", "the page to write", cxxopts::value<std::string>());
  options.parse_positional({"runs"});
  options.positional_help("RUN...");
  const auto parsed = parse_options(options, argc, argv, kExample, {"runs", "output"});
  if (!parsed) {
    return 0;
  }
  std::vector<RunRecord> runs;
  for (const std::string& folder : (*parsed)["runs"].as<std::vector<std::string>>()) {
    runs.push_back(read_run(folder));
    for (const std::string& note : runs.back().notes) {
      std::cerr << note << '\n';
    }
  }
  tell_apart(runs);
  const std::string page = make_report(runs);
  AtomicFile file((*parsed)["output"].as<std::string>());
  file.write(page);
  file.commit();
  std::cout << file.path() << ": " << page.size() << " bytes\n";
  return 0;
}

}  // namespace rwkv
