#include "data/tokenizer_registry.h"

#include <array>
#include <filesystem>
#include <stdexcept>

#include "data/bpe_tokenizer.h"
#include "data/byte_tokenizer.h"
#include "data/sentencepiece_tokenizer.h"
#include "data/world_tokenizer.h"

namespace rwkv {
namespace {

constexpr std::string_view kWorldVocabulary = "rwkv_vocab_v20230424.txt";

struct Kind {
  std::string_view name;  // of the spec, up to the colon
  bool takes_file = false;
  std::string_view description;
  std::unique_ptr<Tokenizer> (*open)(const std::string& file) = nullptr;
};

template <typename T>
std::unique_ptr<Tokenizer> open_file(const std::string& file) {
  return std::make_unique<T>(file);
}

constexpr std::array<Kind, 5> kKinds = {{
    {"world",
     false,
     "RWKV World with the installed vocabulary",
     [](const std::string&) {
       return open_file<WorldTokenizer>(find_installed_file(kWorldVocabulary));
     }},
    {"world",
     true,
     "RWKV World from a vocabulary such as rwkv_vocab_v20230424.txt",
     &open_file<WorldTokenizer>},
    {"neox", true, "GPT-NeoX 20B from 20B_tokenizer.json", &open_file<BpeTokenizer>},
    {"sentencepiece", true, "a sentencepiece model", &open_file<SentencepieceTokenizer>},
    {"bytes",
     false,
     "256 tokens, one a byte value",
     [](const std::string&) -> std::unique_ptr<Tokenizer> {
       return std::make_unique<ByteTokenizer>();
     }},
}};

std::string spec_of(const Kind& kind) {
  return std::string(kind.name) + (kind.takes_file ? ":FILE" : "");
}

}  // namespace

std::unique_ptr<Tokenizer> open_tokenizer(std::string_view spec) {
  const size_t colon = spec.find(':');
  const std::string_view name = spec.substr(0, colon);
  const std::string file(colon == std::string_view::npos ? "" : spec.substr(colon + 1));
  for (const Kind& kind : kKinds) {
    const bool has_form = kind.takes_file ? !file.empty() : colon == std::string_view::npos;
    if (kind.name == name && has_form) {
      return kind.open(file);
    }
  }
  throw std::invalid_argument("tokenizer \"" + std::string(spec) +
                              "\" is of no known kind; expected one of\n" +
                              describe_tokenizer_specs());
}

std::string describe_tokenizer_specs() {
  constexpr size_t kDescriptionColumn = 22;
  std::string text;
  for (const Kind& kind : kKinds) {
    std::string line = "  " + spec_of(kind);
    line.resize(kDescriptionColumn, ' ');
    text += line + std::string(kind.description) + "\n";
  }
  return text;
}

std::string find_installed_file(std::string_view name) {
  return find_installed_file(name, std::filesystem::read_symlink("/proc/self/exe").string());
}

std::string find_installed_file(std::string_view name, const std::string& program) {
  const std::filesystem::path path =
      std::filesystem::path(program).parent_path().parent_path() / "share" / "rookery" / name;
  if (!std::filesystem::exists(path)) {
    throw std::runtime_error(path.string() +
                             ": is not installed; run scripts/setup.sh, which puts it there, or "
                             "name a copy of your own, as in world:FILE");
  }
  return path.string();
}

}  // namespace rwkv
