#include "context_parallel.h"

uint32_t other_version(void);

uint32_t other_version(void) {
    return cp_version();
}
