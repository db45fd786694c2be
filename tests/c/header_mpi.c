/* The MPI header alone, twice, as C and as C++. */
#include "context_parallel_mpi.h"
#include "context_parallel_mpi.h"

int main(void) {
    return cp_mpi_transport(MPI_COMM_NULL, NULL) == CP_ERR_INVALID_ARGUMENT ? 0 : 1;
}
