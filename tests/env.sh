# Where tests/setup put things. Source it (bash): . tests/env.sh
#   VENV_PY       Python with numpy, ml_dtypes, pytest and, if HAVE_TORCH is 1, PyTorch (also -m torch.distributed.run)
#   HAVE_TORCH    1 or 0
#   NO_TORCH_WHY  why PyTorch is not there, one line; empty if it is
#   OPENMPI_BIN   folder with Open MPI's mpicc, mpicxx, mpirun
#   MPICH_BIN     folder with MPICH's
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
unset _root

# Open MPI: run as root (containers), more ranks than cores (4.x and 5.x spell it differently), and a home directory, without which
# even its mpicc stops.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export HOME=${HOME:-/tmp}
# One thread per rank unless a test says otherwise; torchrun warns when this is not set.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
