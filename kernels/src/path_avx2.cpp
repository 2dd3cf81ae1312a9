#include "vector_avx2.h"
// After the vectors that they are written in.
#include "change.h"
#include "columns.h"
#include "rows.h"

namespace qengine {

extern const Kernels kAvx2Kernels = {quantise_scratch, change_scratch, quantise, column_stats,
                                        affine, scale, change};

}  // namespace qengine
