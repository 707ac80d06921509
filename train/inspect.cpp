#include "train/inspect.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <stdexcept>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "data/atomic_file.h"
#include "data/binidx.h"
#include "data/number_text.h"
#include "data/tokenizer_registry.h"
#include "data/utf8.h"
#include "model/formats/format_registry.h"
#include "model/formats/piece_files.h"
#include "model/formats/pth.h"
#include "model/formats/state_tensors.h"
#include "model/formats/tensor_statistics.h"
#include "model/version_shapes.h"
#include "train/config_file.h"
#include "train/event_file.h"
#include "train/manifest.h"
#include "train/report/run_record.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

namespace fs = std::filesystem;
// Keys keep their order: the text is printed from it. Keys of the top but "tensors" are the
// summary.
using Json = nlohmann::ordered_json;

constexpr const char* kTags = "tags";  // of an event file

Json number_or_null(double value) {
  return std::isfinite(value) ? Json(value) : Json();
}

// ---- Weights ------------------------------------------------------------------------------------

bool is_float(WeightDtype dtype) {
  return name_of(dtype).find('f') != std::string_view::npos;
}

Json describe_tensor(const StoredTensor& tensor) {
  const TensorStatistics statistics = statistics_of(tensor);
  return {{"name", replace_malformed_utf8(tensor.name)},
          {"dtype", name_of(tensor.dtype)},
          {"shape", tensor.shape},
          {"elements", statistics.num_elements},
          {"mean", number_or_null(statistics.mean)},
          {"std", number_or_null(statistics.std)},
          {"min", number_or_null(statistics.min)},
          {"max", number_or_null(statistics.max)},
          {"norm", number_or_null(statistics.norm)},
          {"zeros", statistics.num_zeros},
          {"nan", statistics.num_nan},
          {"infinite", statistics.num_infinite}};
}

// "f32" or "bf16 96, f32 3": how many tensors have which.
std::string dtypes_of(const WeightFile& file) {
  std::map<std::string, int> counts;
  for (const StoredTensor& tensor : file.tensors) {
    ++counts[std::string(name_of(tensor.dtype))];
  }
  std::string text;
  for (const auto& [name, number] : counts) {
    text +=
        (text.empty() ? "" : ", ") + name + (counts.size() > 1 ? " " + std::to_string(number) : "");
  }
  return text;
}

std::string kind_without_model(const WeightFile& file) {
  switch (state_kind(file)) {
    case StateKind::kOwn:
      return "RWKV state";
    case StateKind::kTimeState:
      return "RWKV states (att.time_state)";
    case StateKind::kNone:
      break;
  }
  return "weights of no known RWKV version";
}

Json describe_model(const ModelConfig& config) {
  Json model = {{"version", config.version},
                {"n_layer", config.n_layer},
                {"n_embd", config.n_embd},
                {"dim_att", config.dim_att},
                {"dim_ffn", config.dim_ffn}};
  if (config.head_size > 0) {
    model["head_size"] = config.head_size;
  }
  model["vocab_size"] = config.vocab_size;
  return model;
}

// The metadata of a file, the run's configuration in it key by key.
Json describe_metadata(const WeightFile& file) {
  // Not by name: each look for one would go through all before it.
  Json::object_t metadata;
  for (const auto& [key, value] : file.metadata) {
    if (key != kRunConfigKey) {
      metadata.emplace_back(replace_malformed_utf8(key), replace_malformed_utf8(value));
      continue;
    }
    try {
      Json::object_t settings;
      for (const auto& [name, setting] : list_values(value, key)) {
        settings.emplace_back(name, setting);
      }
      metadata.emplace_back(key, std::move(settings));
    } catch (const std::invalid_argument& error) {
      throw std::runtime_error(file.path + ": " + error.what());
    }
  }
  return metadata;
}

// Of all files that hold the tensors.
uint64_t bytes_of(const WeightFile& file) {
  if (!fs::is_directory(file.path)) {
    return fs::file_size(file.path);
  }
  uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(file.path)) {
    const std::string name = entry.path().filename().string();
    bytes += name.starts_with("model.") && name.ends_with(".safetensors") ? entry.file_size() : 0;
  }
  return bytes;
}

Json inspect_weights(const std::string& path) {
  const WeightFile file = read_weights(path);
  // Statistics read every byte anyway.
  verify_checksums(file);
  const auto model = describe_shapes(shapes_of(file));
  Json result = {{"kind", model ? "model" : kind_without_model(file)},
                 {"path", file.path},
                 {"format", file.format},
                 {"bytes", bytes_of(file)}};
  if (model) {
    result.update(describe_model(*model));
  }
  int64_t parameters = 0;
  int64_t not_finite = 0;
  Json tensors = Json::array();
  for (const StoredTensor& tensor : file.tensors) {
    tensors.push_back(describe_tensor(tensor));
    parameters += is_float(tensor.dtype) ? tensor.num_elements() : 0;
    not_finite += tensors.back()["nan"].get<int64_t>() + tensors.back()["infinite"].get<int64_t>();
  }
  result["parameters"] = parameters;
  result["dtypes"] = dtypes_of(file);
  result["not_finite"] = not_finite;
  result["metadata"] = describe_metadata(file);
  result["tensors"] = std::move(tensors);
  return result;
}

// ---- Folders ------------------------------------------------------------------------------------

// Ours have some 200.
constexpr size_t kMaxTrainerBytes = size_t{1} << 16;

Json read_json(const std::string& path) {
  Json json =
      Json::parse(read_text_file(path, kMaxTrainerBytes), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    throw std::runtime_error(path + ": is no JSON object, expected the trainer's record; is the " +
                             "file damaged?");
  }
  return json;
}

Json inspect_checkpoint(const std::string& path) {
  Json result = inspect_weights(path);
  result["kind"] = "checkpoint";
  const std::string damage = find_damage_of_model(path);
  result["damage"] = damage.empty() ? Json() : Json(damage);
  const std::string trainer = (fs::path(path) / "trainer.json").string();
  if (fs::exists(trainer)) {
    const Json tensors = std::move(result["tensors"]);
    result.erase("tensors");
    result["trainer"] = read_json(trainer);
    result["tensors"] = tensors;
  }
  return result;
}

Json inspect_run(const std::string& path) {
  Json run = {{"folder", path}};
  if (fs::exists(fs::path(path) / "metrics.jsonl")) {
    const RunRecord record = read_run(path);
    run["logged_steps"] = record.metrics.num_rows();
    run["last_step"] = number_or_null(record.metrics.last(Metric::kStep));
    run["total_steps"] = number_or_null(record.metrics.last(Metric::kTotalSteps));
    run["tokens"] = number_or_null(record.metrics.last(Metric::kTokens));
    run["smoothed_loss"] = number_or_null(record.metrics.last(Metric::kSmoothedLoss));
    run["validation_loss"] = number_or_null(record.metrics.last(Metric::kValidationLoss));
    run["starts"] = record.starts.size();
    run["samples"] = record.samples.size();
    run["notes"] = record.notes;
  }
  const auto newest = newest_checkpoint(path);
  Json result = newest ? inspect_checkpoint(*newest) : Json{{"kind", ""}, {"path", path}};
  result["kind"] = newest ? "run, and its newest checkpoint" : "run without a checkpoint";
  Json with_run = {{"kind", result["kind"]}, {"run", run}};
  with_run.update(result);
  return with_run;
}

// ---- Corpora, tokenizers, event files -----------------------------------------------------------

std::string_view name_of(TokenDtype dtype) {
  switch (dtype) {
    case TokenDtype::kU8:
      return "u8";
    case TokenDtype::kI8:
      return "i8";
    case TokenDtype::kI16:
      return "i16";
    case TokenDtype::kI32:
      return "i32";
    case TokenDtype::kI64:
      return "i64";
    default:
      return "u16";
  }
}

struct IdRange {
  int64_t least = std::numeric_limits<int64_t>::max();
  int64_t greatest = std::numeric_limits<int64_t>::min();
};

IdRange ids_of(const BinidxFile& file) {
  constexpr int64_t kPieceTokens = int64_t{1} << 16;
  IdRange range;
  std::vector<int64_t> ids;
  for (int64_t begin = 0; begin < file.num_tokens(); begin += kPieceTokens) {
    ids.resize(static_cast<size_t>(std::min(kPieceTokens, file.num_tokens() - begin)));
    file.read(begin, ids);
    const auto [least, greatest] = std::ranges::minmax(ids);
    range = {std::min(range.least, least), std::max(range.greatest, greatest)};
  }
  return range;
}

Json inspect_corpus(const std::string& path) {
  const BinidxFile file(path);
  const IdRange ids = ids_of(file);
  int64_t shortest = file.num_tokens();
  int64_t longest = 0;
  for (int64_t i = 0; i < file.num_documents(); ++i) {
    const int64_t length = file.document_end(i) - file.document_begin(i);
    shortest = std::min(shortest, length);
    longest = std::max(longest, length);
  }
  Json result = {{"kind", "corpus (binidx)"},
                 {"path", file.prefix()},
                 {"tokens", file.num_tokens()},
                 {"documents", file.num_documents()},
                 {"shortest_document", shortest},
                 {"longest_document", longest},
                 {"dtype", name_of(file.dtype())},
                 {"least_id", ids.least},
                 {"greatest_id", ids.greatest}};
  if (const auto& record = file.tokenizer_record()) {
    result["tokenizer"] = {{"identity", record->identity},
                           {"vocab_size", record->vocab_size},
                           {"text_bytes", record->text_bytes}};
    if (record->end_of_document) {
      result["tokenizer"]["end_of_document"] = *record->end_of_document;
    }
  } else {
    result["tokenizer"] = "not recorded: the corpus was made by another program";
  }
  return result;
}

Json inspect_tokenizer(const std::string& spec) {
  const auto tokenizer = open_tokenizer(spec);
  constexpr std::string_view kExample = "Hello world, 1 + 1 = 2.";
  Json result = {{"kind", "tokenizer"},
                 {"spec", spec},
                 {"identity", tokenizer->identity()},
                 {"vocab_size", tokenizer->vocab_size()},
                 {"end_of_document", nullptr},
                 {"lossless", tokenizer->is_lossless()},
                 {"example", {{"text", kExample}, {"ids", tokenizer->encode(kExample)}}}};
  if (const auto id = tokenizer->end_of_document()) {
    result["end_of_document"] = *id;
  }
  return result;
}

Json inspect_events(const std::string& path) {
  EventReader reader(path);
  Json::object_t tags;
  // Where each is in `tags`, which keep the order in which they came.
  std::map<std::string, size_t> places;
  int64_t num_events = 0;
  Json version;
  while (const auto event = reader.next()) {
    ++num_events;
    if (!event->file_version.empty()) {
      version = replace_malformed_utf8(event->file_version);
    }
    for (const EventValue& value : event->values) {
      const auto [place, is_new] = places.emplace(replace_malformed_utf8(value.tag), tags.size());
      if (is_new) {
        tags.emplace_back(place->first,
                          Json{{"kind",
                                value.scalar ? "scalar"
                                : value.text ? "text"
                                             : "other"},
                               {"points", 0},
                               {"first_step", event->step}});
      }
      Json& tag = (tags.begin() + static_cast<ptrdiff_t>(place->second))->second;
      tag["points"] = tag["points"].get<int64_t>() + 1;
      tag["last_step"] = event->step;
      if (value.scalar) {
        tag["last_value"] = number_or_null(*value.scalar);
      }
    }
  }
  return {{"kind", "TensorBoard event file"},
          {"path", path},
          {"version", version},
          {"events", num_events},
          {"cut_bytes", reader.cut_bytes()},
          {kTags, std::move(tags)}};
}

// ---- Which of them it is
// --------------------------------------------------------------------------

std::string_view start_of(const MappedFile& file, size_t length) {
  const auto start = file.bytes().first(std::min(file.bytes().size(), length));
  return {reinterpret_cast<const char*>(start.data()), start.size()};
}

// Whether the file is a sentencepiece model, whatever its name: protobuf's tags and lengths of its
// first piece, a text and its score.
bool starts_with_piece(std::string_view start) {
  if (start.size() < 4 || start[0] != '\x0a' || start[2] != '\x0a') {
    return false;
  }
  const size_t score = size_t{4} + static_cast<unsigned char>(start[3]);
  return score < start.size() && start[score] == '\x15';
}

// The spec by which a file is a tokenizer's, or an empty text.
std::string tokenizer_spec(const std::string& path, const MappedFile& file) {
  const std::string_view text = start_of(file, file.bytes().size());
  const std::string_view start = text.substr(0, 256);
  // Much else is JSON: configurations, records, indexes of shards.
  if (start.starts_with("{") && text.find("\"merges\"") != text.npos) {
    return "neox:" + path;
  }
  // "1 '\x00' 1" is the first line of a World vocabulary.
  if (start.starts_with("1 '") || start.starts_with("1 \"") || start.starts_with("1 b'")) {
    return "world:" + path;
  }
  return path.ends_with(".model") || starts_with_piece(start) ? "sentencepiece:" + path : "";
}

Json inspect_folder(const std::string& path) {
  const fs::path folder(path);
  if (fs::exists(folder / "metrics.jsonl") || fs::exists(folder / "checkpoints")) {
    return inspect_run(path);
  }
  if (fs::exists(folder / "model.safetensors") || has_piece_files(path, "model")) {
    return inspect_checkpoint(path);
  }
  throw std::runtime_error(path + ": is a folder without metrics.jsonl, checkpoints or " +
                           "model.safetensors, expected a run's or a checkpoint's; give one of "
                           "these, or a file");
}

Json inspect_file(const std::string& path) {
  const MappedFile file(path);
  const std::string_view start = start_of(file, 16);
  if (start.starts_with("MMIDIDX") ||
      (path.ends_with(".bin") && fs::exists(corpus_prefix(path) + ".idx"))) {
    return inspect_corpus(path);
  }
  if (is_event_file(file.bytes())) {
    return inspect_events(path);
  }
  const std::string spec = tokenizer_spec(path, file);
  return spec.empty() ? inspect_weights(path) : inspect_tokenizer(spec);
}

Json inspect(const std::string& path) {
  if (fs::is_directory(path)) {
    return inspect_folder(path);
  }
  if (fs::exists(path)) {
    return inspect_file(path);
  }
  if (fs::exists(path + ".idx")) {
    return inspect_corpus(path);
  }
  try {
    return inspect_tokenizer(path);
  } catch (const std::invalid_argument&) {
    throw std::runtime_error(path + ": is not there; expected a file, a folder, the prefix of a " +
                             "corpus, or a tokenizer:\n" + describe_tokenizer_specs());
  }
}

// ---- As text
// --------------------------------------------------------------------------------------

std::string value_text(const Json& value) {
  if (value.is_number_unsigned() || (value.is_number_integer() && value.get<int64_t>() >= 0)) {
    return grouped(value.get<uint64_t>());
  }
  if (value.is_number_float()) {
    const auto number = value.get<double>();
    const bool is_whole = number == std::floor(number) && number >= 0 && number < 1e15;
    return is_whole ? grouped(static_cast<uint64_t>(number)) : fmt::format("{:.6g}", number);
  }
  return value.is_string() ? value.get<std::string>() : value.is_null() ? "-" : value.dump();
}

// "kind scalar, points 144": what has many brothers takes a line.
std::string in_one_line(const Json& object) {
  std::string text;
  for (const auto& [key, value] : object.items()) {
    text += (text.empty() ? "" : ", ") + key + " " + value_text(value);
  }
  return text;
}

// Keys and values in two columns; what is below a key is indented.
void append_summary(const Json& object, size_t indent, std::string& text) {
  for (const auto& [key, value] : object.items()) {
    if ((indent == 0 && key == "tensors") || (value.is_structured() && value.empty())) {
      continue;
    }
    const std::string name = std::string(indent, ' ') + key;
    if (key == kTags) {
      text += name + "\n";
      for (const auto& [tag, points] : value.items()) {
        text += fmt::format("  {:<26} {}\n", tag, in_one_line(points));
      }
    } else if (value.is_object()) {
      text += name + "\n";
      append_summary(value, indent + 2, text);
    } else {
      text += fmt::format("{:<28} {}\n", name, value_text(value));
    }
  }
}

std::string share_text(const Json& tensor, const char* key) {
  const auto number = tensor[key].get<double>();
  const auto elements = tensor["elements"].get<double>();
  return number == 0 ? "-" : fmt::format("{:.3g} %", 100 * number / elements);
}

std::vector<std::string> tensor_row(const Json& tensor) {
  std::vector<std::string> row = {tensor["name"], tensor["shape"].dump(), tensor["dtype"]};
  const int64_t not_finite = tensor["nan"].get<int64_t>() + tensor["infinite"].get<int64_t>();
  // Without a finite number there are no figures; with one, they may be too large.
  const char* missing = tensor["elements"] == not_finite ? "-" : "inf";
  for (const char* key : {"mean", "std", "min", "max", "norm"}) {
    row.push_back(tensor[key].is_null() ? missing
                                        : fmt::format("{:.4g}", tensor[key].get<double>()));
  }
  row.push_back(share_text(tensor, "zeros"));
  row.push_back(not_finite == 0 ? "-" : grouped(static_cast<uint64_t>(not_finite)));
  return row;
}

// Names to the left, numbers to the right.
std::string tensor_table(const Json& tensors) {
  std::vector<std::vector<std::string>> rows = {
      {"tensor", "shape", "dtype", "mean", "std", "min", "max", "norm", "zeros", "not finite"}};
  for (const Json& tensor : tensors) {
    rows.push_back(tensor_row(tensor));
  }
  std::vector<size_t> widths(rows[0].size());
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  constexpr size_t kLeftColumns = 3;
  std::string text;
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      text += i < kLeftColumns
                  ? fmt::format("{:<{}}", row[i], widths[i] + 2)
                  : fmt::format("{:>{}}", row[i], widths[i] + (i > kLeftColumns ? 2 : 0));
    }
    text += '\n';
  }
  return text;
}

// A file's texts must not command the terminal.
std::string without_commands(std::string_view text) {
  std::string shown;
  while (!text.empty()) {
    const size_t length = text[0] == '\n' ? 1 : shown_char_length(text);
    shown += length == 0 ? "?" : text.substr(0, length);
    text.remove_prefix(std::max(length, size_t{1}));
  }
  return shown;
}

}  // namespace

std::string inspect_as_text(const std::string& path) {
  const Json result = inspect(path);
  std::string text;
  append_summary(result, 0, text);
  if (result.contains("tensors")) {
    text += "\n" + tensor_table(result["tensors"]);
  }
  return without_commands(text);
}

std::string inspect_as_json(const std::string& path) {
  return inspect(path).dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace rwkv
