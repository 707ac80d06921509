#include "train/version.h"

namespace rwkv {

const char* rookery_version() {
  return ROOKERY_VERSION;
}

}  // namespace rwkv
