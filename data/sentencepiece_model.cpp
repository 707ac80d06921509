#include "data/sentencepiece_model.h"

#include <stdexcept>

namespace rwkv {
namespace {

// Walks the fields of one protobuf message.
class MessageReader {
 public:
  MessageReader(const std::string& path, std::string_view content) : path_(path), rest_(content) {}

  struct Field {
    uint64_t number = 0;
    uint64_t value = 0;      // of a varint field
    std::string_view bytes;  // of a field with a length: a string or a message
  };
  // False at the end of the message.
  bool next(Field& field) {
    if (rest_.empty()) {
      return false;
    }
    const uint64_t tag = varint();
    field = {tag >> 3, 0, {}};
    switch (tag & 7) {
      case 0:
        field.value = varint();
        break;
      case 1:
        take(8);
        break;
      case 2:
        field.bytes = take(varint());
        break;
      case 5:
        take(4);
        break;
      default:
        fail();
    }
    return true;
  }

 private:
  [[noreturn]] void fail() const {
    throw std::runtime_error(path_ +
                             ": is not a sentencepiece model, or only a part of one; expected a "
                             "file that sentencepiece's trainer wrote");
  }

  std::string_view take(uint64_t length) {
    if (length > rest_.size()) {
      fail();
    }
    const std::string_view taken = rest_.substr(0, length);
    rest_.remove_prefix(length);
    return taken;
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) {
        return value;
      }
    }
    fail();
  }

  const std::string& path_;
  std::string_view rest_;
};

SentencepieceModel::Piece parse_piece(const std::string& path, std::string_view content) {
  SentencepieceModel::Piece piece;
  MessageReader reader(path, content);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 1) {
      piece.text = field.bytes;
    } else if (field.number == 3) {
      piece.type = static_cast<SentencepieceModel::PieceType>(field.value);
    }
  }
  return piece;
}

void parse_normalizer(const std::string& path, std::string_view content, SentencepieceModel& out) {
  MessageReader reader(path, content);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 2) {
      out.has_normalizer_map = !field.bytes.empty();
    } else if (field.number == 3) {
      out.add_dummy_prefix = field.value != 0;
    } else if (field.number == 4) {
      out.remove_extra_whitespaces = field.value != 0;
    } else if (field.number == 5) {
      out.escape_whitespaces = field.value != 0;
    }
  }
}

}  // namespace

SentencepieceModel parse_sentencepiece_model(const std::string& path, std::string_view content) {
  SentencepieceModel model;
  MessageReader reader(path, content);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 1) {
      model.pieces.push_back(parse_piece(path, field.bytes));
    } else if (field.number == 2) {
      MessageReader trainer(path, field.bytes);
      for (MessageReader::Field setting; trainer.next(setting);) {
        if (setting.number == 44) {
          model.unk_surface = setting.bytes;
        }
      }
    } else if (field.number == 3) {
      parse_normalizer(path, field.bytes, model);
    } else if (field.number == 5) {
      SentencepieceModel denormalizer;
      parse_normalizer(path, field.bytes, denormalizer);
      model.has_denormalizer_map = denormalizer.has_normalizer_map;
    }
  }
  return model;
}

}  // namespace rwkv
