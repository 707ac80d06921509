#include "data/sentencepiece_model.h"

#include <cstring>
#include <stdexcept>

#include "data/number_text.h"
#include "data/protobuf_message.h"

namespace rwkv {
namespace {

// The library takes what it is given: it walks down a piece by recursion, holds every piece several
// times over, and writes a replacement wherever a text has what it replaces. The longest piece of
// known models has 100 bytes, the largest vocabulary 256,000 pieces, and the longest replacement of
// NFKC 33 bytes.
constexpr size_t kMaxPieceBytes = 4096;
constexpr size_t kMaxPieces = size_t{1} << 20;
constexpr size_t kMaxReplacementBytes = 256;
constexpr const char* kAdvice = "; use a model that sentencepiece's trainer wrote";

void require_piece_size(const std::string& path, const std::string& what, size_t bytes) {
  if (bytes > kMaxPieceBytes) {
    throw std::runtime_error(path + ": " + what + " " + grouped(bytes) +
                             " bytes, expected at most " + grouped(kMaxPieceBytes) + kAdvice);
  }
}

SentencepieceModel::Piece parse_piece(std::string_view content) {
  SentencepieceModel::Piece piece;
  MessageReader reader(content);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 1) {
      piece.text = field.bytes;
    } else if (field.number == 3) {
      piece.type = static_cast<SentencepieceModel::PieceType>(field.value);
    }
  }
  return piece;
}

uint32_t u32_at(std::string_view bytes, size_t offset) {
  uint32_t value = 0;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

// The table of replacements: u32 size of a trie in bytes; the trie, an array of u32 units; then
// texts that end in NUL, which the trie's leaves name by their offset. The library looks up
// whatever text it is given in that trie and checks no bounds, so that a made-up table reads
// anywhere. A unit that can be matched has bit 31 clear, the distance to the block of 256 units
// with its children in bits 10 to 30 (times 256 if bit 9 is set), and bit 8 if a leaf stands first
// there. Source: google/sentencepiece src/normalizer.cc; s-yata/darts-clone include/darts.h.
void check_normalizer_map(const std::string& path, std::string_view map) {
  const auto fail = [&](const std::string& what) {
    throw std::runtime_error(path + ": the table of replacements of its normaliser " + what +
                             "; the file is damaged");
  };
  constexpr size_t kUnitBytes = sizeof(uint32_t);
  if (map.empty()) {
    return;
  }
  if (map.size() < kUnitBytes || u32_at(map, 0) > map.size() - kUnitBytes) {
    fail("is cut short");
  }
  const std::string_view trie = map.substr(kUnitBytes, u32_at(map, 0));
  const std::string_view texts = map.substr(kUnitBytes + trie.size());
  const size_t num_units = trie.size() / kUnitBytes;
  if (num_units == 0 || texts.empty() || texts.back() != '\0') {
    fail("has no trie, or texts that do not end");
  }
  for (size_t i = 0; i < num_units; ++i) {
    const uint32_t unit = u32_at(trie, i * kUnitBytes);
    // A leaf is no way further, but the first unit is where every look-up starts, whatever it is.
    if (unit >> 31 != 0 && i != 0) {
      continue;
    }
    const size_t children = i ^ (size_t{unit >> 10} << ((unit & 0x200) != 0 ? 8 : 0));
    if ((children | 0xFF) >= num_units) {
      fail("points to unit " + std::to_string(children) + " of " + std::to_string(num_units));
    }
    if ((unit & 0x100) == 0) {
      continue;
    }
    const size_t text = u32_at(trie, children * kUnitBytes) & 0x7FFFFFFF;
    if (text >= texts.size()) {
      fail("points to a text outside its " + std::to_string(texts.size()) + " bytes");
    }
    if (texts.substr(text, kMaxReplacementBytes + 1).find('\0') == std::string_view::npos) {
      fail("holds one longer than " + std::to_string(kMaxReplacementBytes) +
           " bytes, far more than any normaliser's");
    }
  }
}

void parse_normalizer(std::string_view content, SentencepieceModel& out) {
  MessageReader reader(content);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 2) {
      out.normalizer_map = field.bytes;
    } else if (field.number == 3) {
      out.add_dummy_prefix = field.value != 0;
    } else if (field.number == 4) {
      out.remove_extra_whitespaces = field.value != 0;
    } else if (field.number == 5) {
      out.escape_whitespaces = field.value != 0;
    }
  }
}

SentencepieceModel parse_model(const std::string& path, std::string_view content) {
  SentencepieceModel model;
  MessageReader reader(content);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 1) {
      if (model.pieces.size() == kMaxPieces) {
        throw std::runtime_error(path + ": holds more than " + grouped(kMaxPieces) +
                                 " pieces, far more than any model" + kAdvice);
      }
      model.pieces.push_back(parse_piece(field.bytes));
      require_piece_size(path,
                         "piece " + std::to_string(model.pieces.size() - 1) + " has",
                         model.pieces.back().text.size());
    } else if (field.number == 2) {
      MessageReader trainer(field.bytes);
      for (MessageReader::Field setting; trainer.next(setting);) {
        if (setting.number == 44) {
          model.unk_surface = setting.bytes;
          require_piece_size(path, "its unknown token decodes to", setting.bytes.size());
        }
      }
    } else if (field.number == 3) {
      parse_normalizer(field.bytes, model);
    } else if (field.number == 5) {
      SentencepieceModel denormalizer;
      parse_normalizer(field.bytes, denormalizer);
      model.has_denormalizer_map = !denormalizer.normalizer_map.empty();
    }
  }
  return model;
}

}  // namespace

SentencepieceModel parse_sentencepiece_model(const std::string& path, std::string_view content) {
  try {
    SentencepieceModel model = parse_model(path, content);
    check_normalizer_map(path, model.normalizer_map);
    return model;
  } catch (const MalformedMessage&) {
    throw std::runtime_error(path +
                             ": is not a sentencepiece model, or only a part of one; expected a "
                             "file that sentencepiece's trainer wrote");
  }
}

}  // namespace rwkv
