// Losses of two models that need no training run: what a network has to beat.
#pragma once

#include <cstdint>

#include "data/binidx.h"

namespace rwkv {

// Mean of -ln p over the tokens of the validation corpus but its first, which has no context for
// the bigram: nats per token, comparable with a model's validation loss. The model's evaluation
// may leave out the corpus' last, partial window; this counts it.
struct NgramBaseline {
  double unigram_loss = 0;
  double bigram_loss = 0;
};

// With counts c of the training corpus, N tokens, V = vocab_size:
//   unigram  p1(w) = (c(w) + 1) / (N + V)                               add-one smoothing
//   bigram   p2(w | v) = (c(v w) + t(v) p1(w)) / (c(v .) + t(v))        Witten-Bell smoothing
// where c(v .) is how often v was followed by a token and t(v) by how many different ones; after a
// v that never was, p2 = p1. Both sum to 1 over the V ids. Pairs run across document borders, as
// the windows of training do.
// Source: Witten and Bell, "The zero-frequency problem", 1991, method C, interpolated as in Chen
// and Goodman, "An empirical study of smoothing techniques for language modeling", TR-10-98, 1998.
// Throws std::runtime_error naming the file if an id is not below vocab_size or if the validation
// corpus has fewer than two tokens; std::invalid_argument if vocab_size is not in 1 .. 2^31.
// Memory: about 40 bytes for each different pair of neighbours in training (tens of millions in a
// corpus of a billion tokens) and 24 an id. Time: a few tenths of a microsecond a token.
NgramBaseline ngram_baseline(const BinidxFile& train,
                             const BinidxFile& validation,
                             int64_t vocab_size);

}  // namespace rwkv
