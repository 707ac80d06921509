#include "data/sentencepiece_tokenizer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <stdexcept>

#include <sentencepiece_processor.h>

#include "data/atomic_file.h"
#include "data/content_hash.h"
#include "data/sentencepiece_model.h"
#include "data/sentencepiece_text.h"

namespace rwkv {
namespace {

using PieceType = SentencepieceModel::PieceType;

// A model of 256,000 pieces has 4 MB.
constexpr uint64_t kMaxFileBytes = 64 << 20;
// Of what the library says, which may quote from the file.
constexpr size_t kShownBytes = 400;
// Stands for a space in pieces.
constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";

// The byte of a byte token such as <0x0A>.
unsigned char byte_of_piece(const std::string& path, const std::string& text) {
  unsigned byte = 0;
  const bool has_form = text.size() == 6 && text.starts_with("<0x") && text[5] == '>';
  const char* const digits = text.data() + 3;
  if (!has_form || std::from_chars(digits, digits + 2, byte, 16).ptr != digits + 2) {
    throw std::runtime_error(path + ": the byte token \"" + text +
                             "\" is not named as expected, <0x00> .. <0xFF>");
  }
  return static_cast<unsigned char>(byte);
}

// A piece's text with its space symbols as the spaces they stand for.
std::string with_spaces(std::string_view piece) {
  std::string text;
  while (!piece.empty()) {
    const bool is_space = piece.starts_with(kSpaceSymbol);
    text += is_space ? ' ' : piece[0];
    piece.remove_prefix(is_space ? kSpaceSymbol.size() : 1);
  }
  return text;
}

// The library reports some faults of a model by its status, and others by exceptions of its parts.
template <typename Call>
std::string fault_of(const Call& call) {
  try {
    const sentencepiece::util::Status status = call();
    return status.ok() ? "" : status.ToString();
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

struct SentencepieceTokenizer::Impl {
  Impl(std::string model_path, std::string_view content);

  void encode_plain(std::string_view text, std::vector<int32_t>& ids) const;
  void encode_losslessly(std::string_view text, std::vector<int32_t>& ids) const;
  size_t encode_lines(std::string_view text, TextEnd end, std::vector<int32_t>& ids) const;

  std::string path;
  sentencepiece::SentencePieceProcessor processor;
  std::vector<std::string> bytes;       // [id]: what it decodes to
  std::array<int32_t, 256> byte_ids{};  // [byte]: its token, -1 for none
  bool is_lossless = false;
  std::optional<int32_t> line_feed_id;  // if text is encoded line by line
  std::string identity;
};

SentencepieceTokenizer::Impl::Impl(std::string model_path, std::string_view content)
    : path(std::move(model_path)),
      identity("sentencepiece:" + content_hash(std::as_bytes(std::span(content)))) {
  const SentencepieceModel model = parse_sentencepiece_model(path, content);
  const std::string fault = fault_of([&] { return processor.LoadFromSerializedProto(content); });
  if (!fault.empty() || model.pieces.empty() ||
      processor.GetPieceSize() != static_cast<int>(model.pieces.size())) {
    throw std::runtime_error(path + ": is not a usable sentencepiece model (" +
                             fault.substr(0, kShownBytes) +
                             "); expected a file that sentencepiece's trainer wrote");
  }
  if (model.has_denormalizer_map) {
    throw std::runtime_error(path +
                             ": the model has a denormaliser, which is not supported; expected "
                             "one trained without denormalization_rule_tsv");
  }
  byte_ids.fill(-1);
  size_t tokens_with_line_feed = 0;
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    const auto& [text, type] = model.pieces[id];
    // The library holds some of its own reading of a piece to end at a NUL.
    if (text.find('\0') != std::string::npos || processor.IdToPiece(static_cast<int>(id)) != text) {
      throw std::runtime_error(path + ": the name of piece " + std::to_string(id) +
                               " is not a text; the file is damaged");
    }
    std::string decoded;
    if (type == PieceType::kByte) {
      const unsigned char byte = byte_of_piece(path, text);
      byte_ids[byte] = static_cast<int32_t>(id);
      decoded = std::string(1, static_cast<char>(byte));
    } else if (type == PieceType::kUnknown) {
      decoded = model.unk_surface;
    } else if (type != PieceType::kControl) {
      decoded = with_spaces(text);
      if (text.find('\n') != std::string::npos) {
        ++tokens_with_line_feed;
        if (text == "\n" && type == PieceType::kUserDefined) {
          line_feed_id = static_cast<int32_t>(id);
        }
      }
    }
    bytes.push_back(std::move(decoded));
  }
  const bool has_all_bytes =
      std::none_of(byte_ids.begin(), byte_ids.end(), [](int32_t id) { return id < 0; });
  // Without a piece for it, the symbol that stands for a space comes back as that symbol.
  const bool has_space =
      std::any_of(model.pieces.begin(), model.pieces.end(), [](const auto& piece) {
        return piece.text == kSpaceSymbol &&
               (piece.type == PieceType::kNormal || piece.type == PieceType::kUserDefined);
      });
  is_lossless = has_all_bytes && has_space && model.normalizer_map.empty() &&
                !model.add_dummy_prefix && !model.remove_extra_whitespaces &&
                model.escape_whitespaces;
  if (!is_lossless || tokens_with_line_feed != 1) {
    line_feed_id.reset();
  }
}

void SentencepieceTokenizer::Impl::encode_plain(std::string_view text,
                                                std::vector<int32_t>& ids) const {
  std::vector<int> encoded;
  const std::string fault = fault_of([&] { return processor.Encode(text, &encoded); });
  if (!fault.empty()) {
    throw std::runtime_error(path + ": sentencepiece could not encode a text of " +
                             std::to_string(text.size()) +
                             " bytes: " + fault.substr(0, kShownBytes));
  }
  ids.insert(ids.end(), encoded.begin(), encoded.end());
}

void SentencepieceTokenizer::Impl::encode_losslessly(std::string_view text,
                                                     std::vector<int32_t>& ids) const {
  split_plain_text(
      text,
      [&](std::string_view plain) { encode_plain(plain, ids); },
      [&](unsigned char byte) { ids.push_back(byte_ids[byte]); });
}

size_t SentencepieceTokenizer::Impl::encode_lines(std::string_view text,
                                                  TextEnd end,
                                                  std::vector<int32_t>& ids) const {
  size_t done = 0;
  while (const size_t length = next_line_part(text.substr(done), end)) {
    if (text[done] == '\n') {
      ids.push_back(*line_feed_id);
    } else {
      encode_losslessly(text.substr(done, length), ids);
    }
    done += length;
  }
  return done;
}

SentencepieceTokenizer::SentencepieceTokenizer(const std::string& model_path)
    : impl_(std::make_unique<const Impl>(model_path, read_text_file(model_path, kMaxFileBytes))) {}

SentencepieceTokenizer::~SentencepieceTokenizer() = default;

size_t SentencepieceTokenizer::encode_part(std::string_view text,
                                           TextEnd end,
                                           std::vector<int32_t>& ids) const {
  if (impl_->line_feed_id) {
    return impl_->encode_lines(text, end, ids);
  }
  if (end == TextEnd::kMore) {
    return 0;
  }
  if (impl_->is_lossless) {
    impl_->encode_losslessly(text, ids);
  } else {
    impl_->encode_plain(text, ids);
  }
  return text.size();
}

void SentencepieceTokenizer::decode(std::span<const int32_t> ids, std::string& text) const {
  for (const int32_t id : ids) {
    if (id < 0 || static_cast<size_t>(id) >= impl_->bytes.size()) {
      throw std::invalid_argument("token id " + std::to_string(id) +
                                  " is not in the model; its tokens are 0 .. " +
                                  std::to_string(impl_->bytes.size() - 1));
    }
    text += impl_->bytes[static_cast<size_t>(id)];
  }
}

int64_t SentencepieceTokenizer::vocab_size() const {
  return static_cast<int64_t>(impl_->bytes.size());
}

std::optional<int32_t> SentencepieceTokenizer::end_of_document() const {
  const int id = impl_->processor.eos_id();
  return id < 0 ? std::nullopt : std::optional<int32_t>(id);
}

bool SentencepieceTokenizer::is_lossless() const {
  return impl_->is_lossless;
}

std::string SentencepieceTokenizer::identity() const {
  return impl_->identity;
}

}  // namespace rwkv
