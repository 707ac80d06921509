// Writes small right files of every kind for the fuzzers to start from: FOLDER/<target>/<seed>.
// What our writers do not write is read back here, so that a seed is known to be right.
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <sentencepiece_trainer.h>
#include <zlib.h>
#include <zstd.h>

#include "data/atomic_file.h"
#include "data/binidx.h"
#include "data/bpe_tokenizer.h"
#include "data/sentencepiece_training.h"
#include "data/utf8.h"
#include "data/world_tokenizer.h"
#include "model/formats/pickle.h"
#include "model/formats/pth.h"
#include "model/formats/safetensors.h"
#include "model/formats/zip_archive.h"
#include "train/event_file.h"
#include "train/metrics.h"
#include "train/run_config.h"

namespace rwkv::fuzz {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

class Seeds {
 public:
  explicit Seeds(const fs::path& folder) : folder_(folder) {}

  // The folder of a target, made if need be.
  fs::path of(const std::string& target) const {
    fs::create_directories(folder_ / target);
    return folder_ / target;
  }
  void put(const std::string& target, const std::string& name, const std::string& content) const {
    std::ofstream file(of(target) / name, std::ios::binary);
    file << content;
    if (!file.flush()) {
      throw std::runtime_error((of(target) / name).string() + ": cannot be written");
    }
  }

 private:
  fs::path folder_;
};

// ---- Weight files -------------------------------------------------------------------------------

const std::vector<float> kNumbers = {1, 2, 3, 4, 5, 6};

std::vector<TensorToWrite> some_tensors() {
  const auto bytes = std::as_bytes(std::span(kNumbers));
  return {{.name = "emb.weight", .dtype = WeightDtype::kF32, .shape = {2, 3}, .data = bytes},
          {.name = "b", .dtype = WeightDtype::kBf16, .shape = {4}, .data = bytes.first(8)},
          {.name = "none", .dtype = WeightDtype::kI64, .shape = {0, 2}, .data = {}}};
}

// Without the checksum of data.pkl, which would refuse every change to it.
std::string without_checksum(std::string zip) {
  constexpr size_t kCrcOffset = 16;
  const size_t record = zip.find("PK\x01\x02");
  return zip.replace(record + kCrcOffset, 4, 4, '\0');
}

// What torch.save writes for a dict with one tensor, up to the storage's bytes.
std::string one_tensor_pickle() {
  PickleWriter writer;
  writer.global("collections", "OrderedDict");
  writer.empty_tuple();
  writer.call();
  writer.text("w");
  writer.global("torch._utils", "_rebuild_tensor_v2");
  writer.mark();
  writer.mark();
  writer.text("storage");
  writer.global("torch", "FloatStorage");
  writer.text("0");
  writer.text("cpu");
  writer.integer(6);
  writer.tuple();
  writer.persistent();
  writer.integer(0);
  for (const auto& sizes : {std::pair{2, 3}, std::pair{3, 1}}) {
    writer.mark();
    writer.integer(sizes.first);
    writer.integer(sizes.second);
    writer.tuple();
  }
  writer.boolean(false);
  writer.empty_tuple();
  writer.tuple();
  writer.call();
  writer.set_item();
  return writer.finish();
}

std::string legacy_pth() {
  const std::string magic("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15);
  const std::string protocol("\x80\x02M\xe9\x03.", 6);
  const std::string facts("\x80\x02}(X\x0d\0\0\0little_endian\x88u.", 25);
  const std::string keys(
      "\x80\x02]X\x01\0\0\0"
      "0a.",
      11);
  const uint64_t count = kNumbers.size();
  std::string file = magic + protocol + facts + one_tensor_pickle() + keys;
  file.append(reinterpret_cast<const char*>(&count), sizeof count);
  return file.append(reinterpret_cast<const char*>(kNumbers.data()), count * sizeof(float));
}

// A zip whose sizes and offsets are all in zip64 fields.
void write_zip64(const std::string& path) {
  AtomicFile file(path);
  ZipWriter zip(file, /*zip64_from=*/1);
  zip.add("archive/data.pkl", one_tensor_pickle());
  zip.add("archive/data/0", std::as_bytes(std::span(kNumbers)));
  zip.add("archive/version", "3\n");
  zip.finish();
  file.commit();
}

void make_weight_files(const Seeds& seeds) {
  const std::string zip = seeds.of("pth") / "zip";
  write_pth(zip, some_tensors());
  seeds.put("pth", "zip_without_checksum", without_checksum(read_text_file(zip)));
  seeds.put("pth", "legacy", legacy_pth());
  read_pth(seeds.of("pth") / "legacy");
  const std::string zip64 = seeds.of("pth") / "zip64";
  write_zip64(zip64);
  read_pth(zip64);
  seeds.put("pth", "zip64_without_checksum", without_checksum(read_text_file(zip64)));
  write_safetensors(seeds.of("safetensors") / "plain", some_tensors(), {});
  write_safetensors(seeds.of("safetensors") / "metadata", some_tensors(), {{"format", "pt"}});
}

// ---- Texts and corpora --------------------------------------------------------------------------

std::string gzip(const std::string& text) {
  z_stream stream{};
  if (::deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) != Z_OK) {
    throw std::runtime_error("zlib cannot be started");
  }
  std::string out(::deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  ::deflate(&stream, Z_FINISH);
  out.resize(out.size() - stream.avail_out);
  ::deflateEnd(&stream);
  return out;
}

std::string zstd(const std::string& text) {
  std::string out(::ZSTD_compressBound(text.size()), '\0');
  out.resize(::ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

void make_texts(const Seeds& seeds) {
  const std::string rows =
      "{\"text\": \"one \\u00e4\\n\"}\r\n\n{\"id\": [1, -2.5e3, {\"a\": null}], \"text\": "
      "\"two\"}\n"
      "{\"text\": \"\xF0\x9F\x98\x80\"}";
  const std::string plain = "\xEF\xBB\xBFone\ntwo\n";
  // The first byte is the number of the ending: fuzz_text.cpp.
  const std::string contents[] = {
      rows, gzip(rows) + gzip(rows), zstd(rows) + zstd(rows), plain, gzip(plain), zstd(plain)};
  for (size_t ending = 0; ending < std::size(contents); ++ending) {
    seeds.put(
        "text", "ending_" + std::to_string(ending), static_cast<char>(ending) + contents[ending]);
  }
}

void make_corpora(const Seeds& seeds) {
  for (const int64_t vocab_size : {256, 70000}) {
    const std::string prefix = seeds.of("binidx") / "part";
    BinidxWriter writer(
        prefix,
        {.identity = "bytes", .vocab_size = vocab_size, .end_of_document = 0, .text_bytes = 0},
        /*max_item_tokens=*/3);
    for (const std::vector<int32_t>& ids : {std::vector{1, 2, 3, 4, 5}, std::vector{6}}) {
      writer.add_tokens(ids);
      writer.end_document();
    }
    writer.finish(6);
    std::string whole = read_text_file(prefix + ".idx");
    std::string sizes;
    for (const char* ending : {".bin", ".tokenizer.json"}) {
      const std::string part = read_text_file(prefix + ending);
      whole += part;
      sizes += static_cast<char>(part.size() & 255);
      sizes += static_cast<char>(part.size() >> 8);
    }
    for (const char* ending : {".idx", ".bin", ".tokenizer.json"}) {
      fs::remove(prefix + ending);
    }
    seeds.put("binidx", "vocabulary_" + std::to_string(vocab_size), whole + sizes);
  }
}

// ---- Tokenizers ---------------------------------------------------------------------------------

// The characters that stand for the 256 bytes in a byte-level vocabulary.
std::vector<std::string> byte_characters() {
  std::vector<std::string> characters;
  for (uint32_t code = 33; code < 0x144; ++code) {
    if (code <= 126 || (code >= 161 && code != 173)) {
      append_utf8(code, characters.emplace_back());
    }
  }
  return characters;
}

void make_bpe_file(const Seeds& seeds) {
  Json vocabulary = Json::object();
  for (const std::string& character : byte_characters()) {
    vocabulary[character] = vocabulary.size();
  }
  for (const char* merged : {"ll", "llo", "He"}) {
    vocabulary[merged] = vocabulary.size();
  }
  const auto added = [](int id, const char* content, bool normalized) {
    return Json{{"id", id},
                {"content", content},
                {"normalized", normalized},
                {"single_word", false},
                {"lstrip", false},
                {"rstrip", false},
                {"special", !normalized}};
  };
  const Json file = {{"version", "1.0"},
                     {"truncation", nullptr},
                     {"padding", nullptr},
                     {"added_tokens", {added(259, "<|endoftext|>", false), added(260, "  ", true)}},
                     {"normalizer", {{"type", "NFC"}}},
                     {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
                     {"post_processor", nullptr},
                     {"decoder", {{"type", "ByteLevel"}}},
                     {"model",
                      {{"type", "BPE"},
                       {"vocab", vocabulary},
                       {"merges", {"l l", "ll o", Json::array({"H", "e"})}}}}};
  seeds.put("bpe", "small", file.dump());
  BpeTokenizer(seeds.of("bpe") / "small");
}

void make_world_vocabulary(const Seeds& seeds) {
  std::string lines;
  for (int byte = 0; byte < 256; ++byte) {
    char line[32];
    std::snprintf(line, sizeof line, "%d b'\\x%02x' 1\n", byte + 1, byte);
    lines += line;
  }
  lines += "257 'He' 2\r\n258 \"ll\\'o\" 4\n259 '\\u00e4\\n\xC3\xA4' 5\n300 b'\\xff\\xfe' 2";
  seeds.put("world", "small", lines);
  WorldTokenizer(seeds.of("world") / "small");
}

void make_sentencepiece_models(const Seeds& seeds) {
  const fs::path text = seeds.of("sentencepiece") / "text.txt";
  // Words of syllables: enough of both for a vocabulary of 300.
  std::string content;
  for (int i = 0; i < 4000; ++i) {
    content += {"bdfglmnrst"[i % 10], "aeiou"[i / 10 % 5]};
    content += i % 3 == 0 ? "n " : i % 7 == 0 ? "st\n" : "";
  }
  seeds.put("sentencepiece", "text.txt", content);
  for (const auto kind : {SentencepieceKind::kUnigram, SentencepieceKind::kBpe}) {
    train_sentencepiece(
        {.text_files = {text.string()},
         .model_path = text.parent_path() / (kind == SentencepieceKind::kBpe ? "bpe" : "unigram"),
         .vocab_size = 300,
         .kind = kind});
  }
  // What foreign models have and ours do not: a table of replacements, here one for the letter g.
  const fs::path rules = text.parent_path() / "rules.tsv";
  seeds.put("sentencepiece", "rules.tsv", "67\t6B 6A\n48\t68\n");
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      "--input=" + text.string() + " --model_prefix=" + (text.parent_path() / "foreign").string() +
      " --vocab_size=80 --hard_vocab_limit=false --minloglevel=2 --normalization_rule_tsv=" +
      rules.string());
  if (!status.ok()) {
    throw std::runtime_error("sentencepiece could not be trained: " + status.ToString());
  }
  for (const fs::path& made : {text, rules, text.parent_path() / "foreign.vocab"}) {
    fs::remove(made);
  }
}

// ---- Files of a run -----------------------------------------------------------------------------

void make_run_files(const Seeds& seeds) {
  seeds.put("config",
            "small",
            "# a run\n[model]\nversion = \"rwkv4\"\nn_layer = 2\nn_embd = 32\nvocab_size = 256\n"
            "ctx_len = 0x20\n\n[data]\ntrain = 'corpus/a'\norder = \"shuffled\"\n\n[train]\n"
            "run_dir = \"run\"\nbatch_size = 8\ntotal_epochs = 1.5\nl2wrap = 1e-4\n\n"
            "[schedule]\nlr_init = 6e-4\nlr_final = 1_0e-6\n[optimizer]\nlayerwise_lr = false\n");
  load_run_config(seeds.of("config") / "small", {});
  seeds.put(
      "config",
      "dotted",
      "model.version = \"rwkv4\"\ntrain = {run_dir = \"r\", seed = 7}\ndates = [1979-05-27]\n");
  const std::string path = seeds.of("metrics") / "small";
  StepFile metrics(path, 0);
  for (int64_t step = 1; step <= 8; ++step) {
    metrics.append(step, to_json({.step = step, .total_steps = 8, .tokens = 10 * step}));
  }
  metrics.append(8, R"({"step": 8, "tokens": 80, "prompt": "a", "text": "\u00e4"})");
  metrics.append(8, R"({"time": 1.7e9, "step": 8, "parameters": 7, "command": ["rookery", null]})");
}

void make_event_files(const Seeds& seeds) {
  const fs::path folder = seeds.of("events");
  EventWriter writer(folder, /*resumed_step=*/5, /*time_s=*/1.7e9);
  writer.scalar("train/loss", 6, 1.7e9, 2.5);
  writer.text("samples", 6, 1.7e9, "once\nupon");
  writer.flush();
  const std::string file = read_text_file(writer.path());
  fs::remove(writer.path());
  // The first byte says how the rest is taken: fuzz_events.cpp.
  seeds.put("events", "file", '\0' + file);
  constexpr size_t kHeaderBytes = 12;
  constexpr size_t kTrailerBytes = 4;
  std::string messages = "\1";
  for (size_t at = 0; at < file.size();) {
    const auto length = static_cast<unsigned char>(file[at]);
    messages += static_cast<char>(length) + file.substr(at + kHeaderBytes, length);
    at += kHeaderBytes + length + kTrailerBytes;
  }
  seeds.put("events", "messages", messages);
}

int make_all(const fs::path& folder) {
  const Seeds seeds(folder);
  make_weight_files(seeds);
  make_texts(seeds);
  make_corpora(seeds);
  make_bpe_file(seeds);
  make_world_vocabulary(seeds);
  make_sentencepiece_models(seeds);
  make_run_files(seeds);
  make_event_files(seeds);
  return 0;
}

}  // namespace
}  // namespace rwkv::fuzz

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  return rwkv::fuzz::make_all(argv[1]);
}
