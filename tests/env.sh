# Where tests/setup put things. Source it (bash): . tests/env.sh
#   VENV_PY       Python with numpy, ml_dtypes, pytest and, if HAVE_TORCH is 1, PyTorch (also -m torch.distributed.run)
#   HAVE_TORCH    1 or 0
#   NO_TORCH_WHY  why PyTorch is not there, one line; empty if it is
#   OPENMPI_BIN   folder with Open MPI's mpicc, mpicxx, mpirun
#   MPICH_BIN     folder with MPICH's
#   HAVE_CUDA     1 if CUDA's compiler is there, else 0; with 1, builds must succeed with it (CP_CUDA=require)
#   CUDA_TOOLS    folder with cuobjdump and nvdisasm; empty if they are not there
#   NCCL_LIBRARY  the real libnccl.so.2; empty if it is not there
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV_PY=$_root/.venv/bin/python
export OPENMPI_BIN=$_root/.venv/mpi/openmpi/bin
export MPICH_BIN=$_root/.venv/mpi/mpich/bin
export HAVE_TORCH=0 NO_TORCH_WHY=
if [ -f "$_root/.venv/stamps/torch" ]; then
    HAVE_TORCH=1
elif [ -f "$_root/.venv/stamps/no-torch" ]; then
    NO_TORCH_WHY=$(cat "$_root/.venv/stamps/no-torch")
else
    NO_TORCH_WHY="tests/setup has not run"
fi
# The compiler is left to build.rs, which looks into .venv/cuda: a variable more or less would make cargo compile again.
export HAVE_CUDA=0 CUDA_TOOLS= NCCL_LIBRARY=
if [ -f "$_root/.venv/stamps/cuda" ]; then
    HAVE_CUDA=1
    export CP_CUDA=${CP_CUDA:-require}
fi
for _file in "$_root"/.venv/cuda-tools/lib/python3*/site-packages/nvidia/cu13/bin/cuobjdump; do
    [ ! -x "$_file" ] || CUDA_TOOLS=${_file%/*}
done
for _file in "$_root"/.venv/nccl/lib/python3*/site-packages/nvidia/nccl/lib/libnccl.so.2; do
    [ ! -f "$_file" ] || NCCL_LIBRARY=$_file
done
unset _root _file

# Open MPI: run as root (containers), more ranks than cores (4.x and 5.x spell it differently), and a home directory, without which
# even its mpicc stops.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export HOME=${HOME:-/tmp}
# One thread per rank unless a test says otherwise; torchrun warns when this is not set.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
