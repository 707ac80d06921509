#include <cstring>
#include <stdexcept>

#include "model/formats/weight_file.h"

namespace rwkv {
namespace {

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) {
    return float_of_bits(sign | 0x7f800000u | (mantissa << 13));
  }
  if (exponent == 0) {
    // Zero and subnormals: mantissa * 2^-24, exact in float.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_of_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00u);
  }
  // 65520 is half way between the largest half and 65536: it and all above go to infinity.
  if (magnitude >= 0x477ff000u) {
    return static_cast<uint16_t>(sign | 0x7c00u);
  }
  if (magnitude >= 0x38800000u) {
    // Normal: rebias the exponent by 112, then round the 13 bits that go; a carry out of the
    // mantissa moves the exponent up, as it should.
    const uint32_t rebiased = magnitude - (112u << 23);
    const uint32_t rounded = rebiased + 0xfffu + ((rebiased >> 13) & 1u);
    return static_cast<uint16_t>(sign | (rounded >> 13));
  }
  // Subnormal: the result counts steps of 2^-24. Adding 0.5 leaves the sum with exactly that step,
  // so the addition itself rounds to nearest, ties to even.
  const uint32_t sum = bits_of(float_of_bits(magnitude) + 0.5f);
  return static_cast<uint16_t>(sign | (sum - bits_of(0.5f)));
}

uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    // Rounding could turn NaN into infinity; the quiet bit keeps it NaN.
    return static_cast<uint16_t>((bits >> 16) | 0x40u);
  }
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// One floating-point type each, by way of double: it holds every value of the four.
struct F64 {
  static double load_from(const std::byte* from) { return load<double>(from); }
  static void store(double value, std::byte* to) { std::memcpy(to, &value, sizeof value); }
};
struct F32 {
  static double load_from(const std::byte* from) { return static_cast<double>(load<float>(from)); }
  static void store(double value, std::byte* to) {
    const auto single = static_cast<float>(value);
    std::memcpy(to, &single, sizeof single);
  }
};
struct F16 {
  static double load_from(const std::byte* from) {
    return static_cast<double>(float_of_half(load<uint16_t>(from)));
  }
  static void store(double value, std::byte* to) {
    const uint16_t bits = half_of_float(static_cast<float>(value));
    std::memcpy(to, &bits, sizeof bits);
  }
};
struct Bf16 {
  static double load_from(const std::byte* from) {
    return static_cast<double>(float_of_bits(static_cast<uint32_t>(load<uint16_t>(from)) << 16));
  }
  static void store(double value, std::byte* to) {
    const uint16_t bits = bf16_of_float(static_cast<float>(value));
    std::memcpy(to, &bits, sizeof bits);
  }
};

// Calls `use` with the type above that `dtype` names; false if it is not a floating-point type.
template <class Use>
bool with_floating_type(WeightDtype dtype, Use use) {
  switch (dtype) {
    case WeightDtype::kF64:
      use(F64{});
      return true;
    case WeightDtype::kF32:
      use(F32{});
      return true;
    case WeightDtype::kF16:
      use(F16{});
      return true;
    case WeightDtype::kBf16:
      use(Bf16{});
      return true;
    default:
      return false;
  }
}

}  // namespace

std::vector<std::byte> convert_elements(std::span<const std::byte> elements,
                                        WeightDtype from,
                                        WeightDtype to) {
  const auto from_bytes = static_cast<size_t>(size_of(from));
  const auto to_bytes = static_cast<size_t>(size_of(to));
  if (elements.size() % from_bytes != 0) {
    throw std::invalid_argument(std::to_string(elements.size()) + " bytes are no whole number of " +
                                std::string(name_of(from)) + " elements of " +
                                std::to_string(from_bytes) + " bytes");
  }
  if (from == to) {
    return {elements.begin(), elements.end()};
  }
  const size_t n = elements.size() / from_bytes;
  std::vector<std::byte> result(n * to_bytes);
  bool converted = false;
  with_floating_type(from, [&](auto source) {
    converted = with_floating_type(to, [&](auto target) {
      for (size_t i = 0; i < n; ++i) {
        target.store(source.load_from(elements.data() + i * from_bytes),
                     result.data() + i * to_bytes);
      }
    });
  });
  if (!converted) {
    throw std::invalid_argument("cannot convert " + std::string(name_of(from)) + " to " +
                                std::string(name_of(to)) +
                                "; only f64, f32, f16 and bf16 convert to each other");
  }
  return result;
}

}  // namespace rwkv
