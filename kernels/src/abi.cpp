#include "qengine.h"

extern "C" QENGINE_API uint32_t qengine_abi_version(void) { return QENGINE_ABI_VERSION; }
