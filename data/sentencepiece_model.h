// The settings inside a sentencepiece .model file, which the library does not tell.
// Source: google/sentencepiece src/sentencepiece_model.proto. The file is a protobuf message; the
// few fields needed here are read straight from its wire format.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {

struct SentencepieceModel {
  enum class PieceType : uint8_t {
    kNormal = 1,
    kUnknown = 2,
    kControl = 3,
    kUserDefined = 4,
    kUnused = 5,
    kByte = 6,
  };
  struct Piece {
    std::string text;
    PieceType type = PieceType::kNormal;
  };
  // normalizer_spec and denormalizer_spec, with the values they have where the file says nothing.
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
  std::string normalizer_map;  // a table of replacements; empty if there is none
  bool has_denormalizer_map = false;
  std::string unk_surface = " \xE2\x81\x87 ";  // what the unknown token decodes to
  std::vector<Piece> pieces;                   // [id]
};

// `path` is for the error texts. Throws std::runtime_error "PATH: ..." if `content` does not read
// as such a message, if the library would read outside of it, or if it holds what no model does and
// the library would run out of stack or memory over: a piece (or an unk_surface) of more than 4096
// bytes, more than 2^20 pieces, a replacement of more than 256 bytes.
SentencepieceModel parse_sentencepiece_model(const std::string& path, std::string_view content);

}  // namespace rwkv
