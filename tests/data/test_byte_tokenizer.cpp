#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/byte_tokenizer.h"
#include "tests/support/encode_in_parts.h"
#include "tests/support/test_data.h"
#include "tests/support/tokenizer_golden.h"

namespace rwkv {
namespace {

TEST(ByteTokenizer, GivesTheIdsOfRwkvCppsPrompt) {
  EXPECT_THAT(ByteTokenizer().encode("\"in"), testing::ElementsAre(34, 105, 110));
}

TEST(ByteTokenizer, EncodesEveryByteAsItsNumber) {
  const ByteTokenizer tokenizer;
  for (int byte = 0; byte < 256; ++byte) {
    const std::string text(1, static_cast<char>(byte));
    EXPECT_THAT(tokenizer.encode(text), testing::ElementsAre(byte));
    EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{byte}), text);
  }
}

TEST(ByteTokenizer, IsLosslessAndNeverWaitsForMoreText) {
  const ByteTokenizer tokenizer;
  std::mt19937_64 random(1);
  const std::string text = test::awkward_text(random, 1000);
  std::vector<int32_t> ids = {7};
  EXPECT_EQ(tokenizer.encode_part(text, Tokenizer::TextEnd::kMore, ids), text.size());
  EXPECT_EQ(ids[0], 7);
  ids.erase(ids.begin());
  EXPECT_EQ(tokenizer.decode(ids), text);
  EXPECT_TRUE(tokenizer.is_lossless());
  EXPECT_EQ(tokenizer.vocab_size(), 256);
  EXPECT_EQ(tokenizer.end_of_document(), 0);
  EXPECT_EQ(tokenizer.identity(), "bytes");
}

TEST(ByteTokenizer, RefusesToDecodeWhatIsNoByte) {
  for (const int32_t id : {-1, 256}) {
    const std::string text =
        THROWN_TEXT(std::invalid_argument, (void)ByteTokenizer().decode(std::vector<int32_t>{id}));
    EXPECT_THAT(text, testing::HasSubstr("token id " + std::to_string(id)));
    EXPECT_THAT(text, testing::HasSubstr("0 .. 255"));
  }
}

}  // namespace
}  // namespace rwkv
