#include "model/formats/weight_file.h"
