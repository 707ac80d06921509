#include "data/sentencepiece_model.h"

#include <stdexcept>

#include "data/protobuf_message.h"

namespace rwkv {
namespace {

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

void parse_normalizer(std::string_view content, SentencepieceModel& out) {
  MessageReader reader(content);
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

SentencepieceModel parse_model(std::string_view content) {
  SentencepieceModel model;
  MessageReader reader(content);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 1) {
      model.pieces.push_back(parse_piece(field.bytes));
    } else if (field.number == 2) {
      MessageReader trainer(field.bytes);
      for (MessageReader::Field setting; trainer.next(setting);) {
        if (setting.number == 44) {
          model.unk_surface = setting.bytes;
        }
      }
    } else if (field.number == 3) {
      parse_normalizer(field.bytes, model);
    } else if (field.number == 5) {
      SentencepieceModel denormalizer;
      parse_normalizer(field.bytes, denormalizer);
      model.has_denormalizer_map = denormalizer.has_normalizer_map;
    }
  }
  return model;
}

}  // namespace

SentencepieceModel parse_sentencepiece_model(const std::string& path, std::string_view content) {
  try {
    return parse_model(content);
  } catch (const MalformedMessage&) {
    throw std::runtime_error(path +
                             ": is not a sentencepiece model, or only a part of one; expected a "
                             "file that sentencepiece's trainer wrote");
  }
}

}  // namespace rwkv
