"""Megatron's rank grid: who works together along which axis, and groups for it.

`Mesh` knows sizes and an order, nothing else. `ParallelState` is one rank's view of it under the names that Megatron's `parallel_state` has; given this
library's group of all ranks it hands out subsets of it, which cost nothing: no communicator is made.
"""

import functools
from ctypes import byref, c_size_t, c_uint32

import numpy as np

from . import _abi
from ._lib import Error, Status, argument_error, check, lib, number

DEFAULT_ORDER = "tp-cp-ep-dp-pp"


class Mesh:
    """Ranks in a grid with the axes tp, cp, ep, dp, pp. The order names them, the first with stride 1; those of size 1 may be left out.

    dp: None is what world_size leaves, or 1. A mesh has cp > 1 or ep > 1, not both: `expert` makes the one that experts use. Immutable.

        mesh = Mesh(16, tp=2, cp=2, pp=2)          # dp = 2
        mesh.members("cp", 5)                      # [5, 7]
        mesh.groups("dp-cp")                       # [[0, 2, 4, 6], [1, 3, 5, 7], …]
    """

    def __init__(self, world_size=None, *, tp=1, cp=1, ep=1, dp=None, pp=1, order=DEFAULT_ORDER, first_rank=0):
        sizes = dict(tp=tp, cp=cp, ep=ep, dp=dp, pp=pp, world_size=world_size)
        for name, size in sizes.items():
            # To C 0 means the default, so that a size of 0 would pass.
            if size is None and name in ("dp", "world_size"):
                sizes[name] = 0
            elif number(name, size) == 0:
                raise argument_error(f"{name}: got 0, must be at least 1")
        self._set(_abi.cp_mesh(first_rank=number("first_rank", first_rank), order=_text("order", order), **sizes))

    def _set(self, struct):
        check(lib.cp_mesh_fill(byref(struct), byref(struct)))
        struct.order = bytes(struct.order)  # Its own: that of an expert mesh points to the other mesh's.
        self._struct = struct
        self.tp, self.cp, self.ep, self.dp, self.pp = struct.tp, struct.cp, struct.ep, struct.dp, struct.pp
        self.world_size, self.first_rank, self.order = struct.world_size, struct.first_rank, struct.order.decode()

    def expert(self, tp=None, ep=1):
        """The mesh of the experts over the same ranks: cp = 1, tp (None: as here) and ep of its own, dp what they leave, the same pipeline stages."""
        struct = _abi.cp_mesh()
        check(lib.cp_mesh_expert(byref(self._struct), number("tp", self.tp if tp is None else tp), number("ep", ep), byref(struct)))
        made = object.__new__(Mesh)
        made._set(struct)
        return made

    def size(self, axes):
        """Number of ranks in a group along one axis or several joined by "-"."""
        size = c_size_t()
        check(lib.cp_mesh_groups(byref(self._struct), _text("axes", axes), None, 0, byref(size)))
        return size.value

    def members(self, axes, rank):
        """The group of a rank along `axes`: the ranks that differ from it in those coordinates only, ascending."""
        return self._members(lib.cp_mesh_members, axes, number("rank", rank))[0]

    def rank_in(self, axes, rank):
        """Place of a rank in its group."""
        return self._members(lib.cp_mesh_members, axes, number("rank", rank))[1]

    def groups(self, axes):
        """All groups along `axes`, by their first member."""
        size, made = c_size_t(), np.zeros(self.world_size, np.uint32)
        check(lib.cp_mesh_groups(byref(self._struct), _text("axes", axes), made.ctypes.data, len(made), byref(size)))
        return made.reshape(-1, size.value).tolist()

    def level_members(self, sizes, level, rank, axes="cp"):
        """The group of a rank on a level of a hierarchy over its group along `axes`: sizes[0] neighbours on level 0, on every further level ranks as far
        apart as the levels below are large."""
        list = np.array([number("sizes", s) for s in sizes], np.uint32)
        return self._members(lib.cp_mesh_level_members, axes, list.ctypes.data, len(list), number("level", level), number("rank", rank))[0]

    def consecutive_members(self, group_size, rank, axes="dp-cp"):
        """The group of `group_size` consecutive members of the group along `axes` that a rank is in. Any size; ranks that it leaves over are in none."""
        return self._members(lib.cp_mesh_consecutive_members, axes, number("group_size", group_size), number("rank", rank))[0]

    def _members(self, function, axes, *arguments):
        made, count, index = np.zeros(self.world_size, np.uint32), c_size_t(), c_uint32()
        check(function(byref(self._struct), _text("axes", axes), *arguments, made.ctypes.data, len(made), byref(count), byref(index)))
        return made[: count.value].tolist(), index.value

    def __repr__(self):
        sizes = ", ".join(f"{axis}={getattr(self, axis)}" for axis in ("tp", "cp", "ep", "dp", "pp") if getattr(self, axis) > 1)
        return f"Mesh({self.world_size}, {sizes}{', ' if sizes else ''}order={self.order!r})"


def _text(name, value):
    if not isinstance(value, str) or "\0" in value:
        raise argument_error(f"{name}: got {value!r}, need axes joined by -, as in {DEFAULT_ORDER!r}")
    return value.encode()


def _accessors(axes, mesh="mesh"):
    """Megatron's three functions about the group along `axes`."""

    def group(self, check_initialized=True):
        return self._group(self._ranks(mesh, axes), check_initialized)

    def world_size(self):
        return getattr(self, mesh).size(axes)

    def rank(self):
        return getattr(self, mesh).rank_in(axes, self.rank)

    group.__doc__, world_size.__doc__, rank.__doc__ = f"Group along {axes}.", f"Ranks along {axes}.", f"This rank's place along {axes}."
    return group, world_size, rank


class ParallelState:
    """One rank's place among all, under the names of Megatron's parallel_state: the arguments are initialize_model_parallel's, the methods its accessors.

        state = ParallelState(16, rank, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2, group=Group.from_env())
        layer.set_group(state.get_context_parallel_group(), "p2p")

    group: this library's group of all ranks, in their order. Groups are subsets of it, made at the first request and kept; without it the methods that
    return ranks and sizes work, and those that return groups raise, or return None with check_initialized=False.
    hierarchical_context_parallel_sizes: one size per level, any number of levels, the innermost first. For "a2a+p2p" a layer takes the whole
    context-parallel group and level_sizes=hierarchical_context_parallel_sizes; it needs no group per level.
    Nothing is set up for hybrid (dynamic) groups: every size is there.
    """

    def __init__(
        self,
        world_size,
        rank,
        *,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        hierarchical_context_parallel_sizes=None,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        order=DEFAULT_ORDER,
        rank_offset=0,
        group=None,
    ):
        tp, cp, pp = tensor_model_parallel_size, context_parallel_size, pipeline_model_parallel_size
        self.mesh = Mesh(world_size, tp=tp, cp=cp, pp=pp, order=order, first_rank=rank_offset)
        self._expert = expert_tensor_parallel_size, expert_model_parallel_size
        if self._expert != (None, 1):
            self.expert_mesh  # noqa: B018 - refused now, not at the first use
        self.rank, self.levels, self._made = number("rank", rank), None, {}
        self.mesh.members("cp", self.rank)  # Is it a rank of the mesh?
        if hierarchical_context_parallel_sizes is not None:
            self.levels = list(hierarchical_context_parallel_sizes)
            self.mesh.level_members(self.levels, 0, self.rank)
        last = self.mesh.first_rank + self.mesh.world_size
        if group is not None and (group.rank != self.rank or group.size < last):
            raise argument_error(f"group: its rank {group.rank} of {group.size} is called rank {self.rank} of {last} here; give the group of all ranks")
        self.group = group

    @functools.cached_property
    def expert_mesh(self):
        """The mesh of the experts. Without experts nothing is asked of it: Megatron refuses tp-cp-ep-pp-dp with cp > 1 for their sake."""
        return self.mesh.expert(*self._expert)

    def _ranks(self, mesh, axes):
        return getattr(self, mesh).members(axes, self.rank)

    def _group(self, ranks, check_initialized=True):
        if self.group is None:
            if check_initialized:
                raise Error(Status.INVALID_USAGE, "invalid usage: group: none was given to ParallelState, so there are ranks and sizes but no groups")
            return None
        key = tuple(ranks)
        if key not in self._made:
            self._made[key] = self.group.subset(ranks)
        return self._made[key]

    # Context parallel

    get_context_parallel_group, get_context_parallel_world_size, get_context_parallel_rank = _accessors("cp")

    def get_context_parallel_global_ranks(self, check_initialized=True):
        """Ranks of the context-parallel group."""
        return self._ranks("mesh", "cp")

    def get_hierarchical_context_parallel_global_ranks(self):
        """Ranks of this rank's group on every level, the innermost first. (Not in Megatron.)"""
        if self.levels is None:
            raise Error(Status.INVALID_USAGE, "invalid usage: hierarchical_context_parallel_sizes: none were given to ParallelState")
        return [self.mesh.level_members(self.levels, level, self.rank) for level in range(len(self.levels))]

    def get_hierarchical_context_parallel_groups(self, check_initialized=True):
        """This rank's group on every level, the innermost first."""
        if self.levels is None and not check_initialized:
            return None
        groups = [self._group(ranks, check_initialized) for ranks in self.get_hierarchical_context_parallel_global_ranks()]
        return None if None in groups else groups

    def get_hybrid_data_context_parallel_groups(self, check_initialized=True, group_size=None):
        """The group of `group_size` consecutive members of the dp-cp group that this rank is in, any size (None: all). Ranks that a size leaves
        over are in no such group: an error for them, where Megatron hands out a shorter group."""
        size = self.mesh.size("dp-cp") if group_size is None else group_size
        return self._group(self.mesh.consecutive_members(size, self.rank), check_initialized)

    get_dynamic_data_context_parallel_groups = get_hybrid_data_context_parallel_groups
    (
        get_tensor_and_context_parallel_group,
        get_tensor_and_context_parallel_world_size,
        get_tensor_and_context_parallel_rank,
    ) = _accessors("tp-cp")

    # Data parallel

    def get_data_parallel_group(self, with_context_parallel=False):
        """Data parallel, or data and context parallel: gradients and the loss are reduced over the latter."""
        return self._group(self._ranks("mesh", "dp-cp" if with_context_parallel else "dp"))

    def get_data_parallel_world_size(self, with_context_parallel=False):
        """Size of get_data_parallel_group."""
        return self.mesh.size("dp-cp" if with_context_parallel else "dp")

    def get_data_parallel_rank(self, with_context_parallel=False):
        """This rank's place in get_data_parallel_group."""
        return self.mesh.rank_in("dp-cp" if with_context_parallel else "dp", self.rank)

    def get_data_parallel_src_rank(self, with_context_parallel=False):
        """First rank of get_data_parallel_group."""
        return self._ranks("mesh", "dp-cp" if with_context_parallel else "dp")[0]

    def get_tensor_and_data_parallel_group(self, check_initialized=True, with_context_parallel=False):
        """Tensor and data parallel, or with context parallel too."""
        return self._group(self._ranks("mesh", "tp-dp-cp" if with_context_parallel else "tp-dp"), check_initialized)

    def get_amax_reduction_group(self, with_context_parallel=False, tp_only_amax_red=False):
        """Over which FP8 amax values are reduced: tp-dp, tp-dp-cp, tp or tp-cp."""
        axes = "tp" if tp_only_amax_red else "tp-dp"
        return self._group(self._ranks("mesh", f"{axes}-cp" if with_context_parallel else axes))

    # Tensor and pipeline parallel

    (
        get_tensor_model_parallel_group,
        get_tensor_model_parallel_world_size,
        get_tensor_model_parallel_rank,
    ) = _accessors("tp")
    (
        get_pipeline_model_parallel_group,
        get_pipeline_model_parallel_world_size,
        get_pipeline_model_parallel_rank,
    ) = _accessors("pp")
    get_model_parallel_group, _, _ = _accessors("tp-pp")

    def get_tensor_model_parallel_src_rank(self):
        """First rank of the tensor-parallel group."""
        return self._ranks("mesh", "tp")[0]

    def get_model_parallel_src_rank(self):
        """First rank of the tensor- and pipeline-parallel group."""
        return self._ranks("mesh", "tp-pp")[0]

    def _stage(self, step):
        ranks = self._ranks("mesh", "pp")
        return ranks[(ranks.index(self.rank) + step) % len(ranks)]

    def get_pipeline_model_parallel_first_rank(self):
        """This rank's counterpart in the first pipeline stage."""
        return self._ranks("mesh", "pp")[0]

    def get_pipeline_model_parallel_last_rank(self):
        """This rank's counterpart in the last pipeline stage."""
        return self._ranks("mesh", "pp")[-1]

    def get_pipeline_model_parallel_next_rank(self):
        """In the next stage; after the last the first."""
        return self._stage(1)

    def get_pipeline_model_parallel_prev_rank(self):
        """In the stage before; before the first the last."""
        return self._stage(-1)

    def is_pipeline_first_stage(self):
        """Has the first layers?"""
        return self.get_pipeline_model_parallel_rank() == 0

    def is_pipeline_last_stage(self):
        """Has the last layers?"""
        return self.get_pipeline_model_parallel_rank() == self.mesh.pp - 1

    # Experts, on their own mesh

    (
        get_expert_model_parallel_group,
        get_expert_model_parallel_world_size,
        get_expert_model_parallel_rank,
    ) = _accessors("ep", "expert_mesh")
    (
        get_expert_tensor_parallel_group,
        get_expert_tensor_parallel_world_size,
        get_expert_tensor_parallel_rank,
    ) = _accessors("tp", "expert_mesh")
    (
        get_expert_tensor_and_model_parallel_group,
        get_expert_tensor_and_model_parallel_world_size,
        get_expert_tensor_and_model_parallel_rank,
    ) = _accessors("tp-ep", "expert_mesh")
    get_expert_tensor_model_pipeline_parallel_group, _, _ = _accessors("tp-ep-pp", "expert_mesh")
    (
        get_expert_data_parallel_group,
        get_expert_data_parallel_world_size,
        get_expert_data_parallel_rank,
    ) = _accessors("dp", "expert_mesh")

    def __repr__(self):
        return f"ParallelState(rank={self.rank}, {self.mesh!r})"


_COMM_TYPES = {_abi.CP_COMM_P2P: "p2p", _abi.CP_COMM_ALL_GATHER: "all_gather", _abi.CP_COMM_A2A: "a2a", _abi.CP_COMM_A2A_P2P: "a2a+p2p"}


def comm_types_per_layer(cp_comm_type, layers):
    """The communication type of each of `layers` layers, as Attention.set_group takes them.

    cp_comm_type: a name for all; a list, or names in one text, one per layer; or a shorter list whose length divides `layers`, which is repeated
    (Megatron rejects that). all_gather may be written allgather.
    """
    names = [cp_comm_type] if isinstance(cp_comm_type, str) else list(cp_comm_type)
    for name in names:
        if not isinstance(name, str) or "\0" in name or (not isinstance(cp_comm_type, str) and (name.split() != [name] or "," in name)):
            raise argument_error(f"cp_comm_type: got {name!r}, allowed {', '.join(map(repr, _COMM_TYPES.values()))}")
    layers = number("layers", layers)
    if layers > 1 << 20:
        raise argument_error(f"layers: got {layers}, allowed 1 … {1 << 20}")
    made = np.zeros(layers + 1, np.uint32)
    check(lib.cp_comm_types_per_layer(" ".join(names).encode(), layers, made.ctypes.data))
    return [_COMM_TYPES[code] for code in made[:-1].tolist()]
