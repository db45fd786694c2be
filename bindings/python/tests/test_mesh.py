"""The rank grid and its groups, communication types per layer, padding: Megatron's own answers (tests/data/mesh), and its documents' examples."""

import csv
import gc

import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from corpus import ROOT
from ranks import everywhere

pytestmark = pytest.mark.fast


def rows(name):
    with open(ROOT / "tests/data/mesh" / name, newline="") as file:
        return list(csv.DictReader(file))


def numbers(text):
    return [int(n) for n in text.split()]


def raises(status, words, call, *arguments, **keywords):
    with pytest.raises(cp.Error) as caught:
        call(*arguments, **keywords)
    assert caught.value.status == status, caught.value
    assert words in str(caught.value), str(caught.value)


# Mesh


def test_groups_are_megatrons():
    cases = rows("groups.csv")
    assert len(cases) == 60
    for c in cases:
        mesh = cp.Mesh(order=c["order"], **{axis: int(c[axis]) for axis in ("tp", "cp", "ep", "dp", "pp")})
        groups = [numbers(g) for g in c["groups"].split(";")]
        assert mesh.groups(c["axes"]) == groups, c
        for group in groups:
            assert mesh.size(c["axes"]) == len(group)
            for place, rank in enumerate(group):
                assert mesh.members(c["axes"], rank) == group
                assert mesh.rank_in(c["axes"], rank) == place


def test_levels_and_consecutive_members():
    mesh = cp.Mesh(cp=8)
    assert [mesh.level_members([4, 2], level, 6) for level in (0, 1)] == [[4, 5, 6, 7], [2, 6]]
    mesh = cp.Mesh(16, tp=2, cp=8)
    assert [mesh.level_members([2, 4], level, 6) for level in (0, 1)] == [[4, 6], [2, 6, 10, 14]]
    mesh = cp.Mesh(cp=16)
    assert [mesh.level_members([2, 2, 4], level, 10) for level in (0, 1, 2)] == [[10, 11], [8, 10], [2, 6, 10, 14]]
    mesh = cp.Mesh(6, cp=2)
    assert mesh.dp == 3
    assert [mesh.consecutive_members(3, rank) for rank in (0, 4)] == [[0, 1, 2], [3, 4, 5]]
    assert mesh.consecutive_members(4, 3) == [0, 1, 2, 3]
    # Megatron's create_hybrid_dp_cp_groups files [4, 5] under 4.
    raises(Status.INVALID_ARGUMENT, "leave over [4, 5]", mesh.consecutive_members, 4, 5)


def test_experts():
    mesh = cp.Mesh(16, tp=2, cp=2, pp=2)
    expert = mesh.expert(tp=1, ep=4)
    assert (expert.tp, expert.cp, expert.ep, expert.dp, expert.pp) == (1, 1, 4, 2, 2)
    assert (mesh.expert().tp, mesh.expert().dp) == (2, 4)
    del mesh
    gc.collect()
    assert expert.members("ep", 5) == [4, 5, 6, 7] and expert.order == "tp-cp-ep-dp-pp"
    raises(Status.INVALID_ARGUMENT, "other pipeline stages", cp.Mesh(16, tp=2, cp=2, pp=2, order="tp-cp-ep-pp-dp").expert, 2, 4)


def test_what_is_wrong_with_a_mesh():
    def wrong(words, *arguments, **keywords):
        raises(Status.INVALID_ARGUMENT, words, cp.Mesh, *arguments, **keywords)

    wrong("\"xp\" is no axis; axes are tp, cp, ep, dp, pp", order="tp-xp")
    wrong("names tp twice", order="tp-cp-tp")
    wrong("does not name pp, whose size is 2", pp=2, order="tp-dp")
    wrong("ep: got 2 with cp 2", cp=2, ep=2)
    wrong("does not divide", 12, tp=8)
    wrong("world size: got 12, but", 12, tp=2, dp=2)
    wrong("tp: got 0", tp=0)
    wrong("world_size: got 0", 0)
    wrong("cp: got -1", cp=-1)
    wrong("order: got None", order=None)
    mesh = cp.Mesh(4, cp=2, first_rank=4)
    assert mesh.members("cp", 6) == [6, 7] and repr(mesh) == "Mesh(4, cp=2, dp=2, order='tp-cp-ep-dp-pp')"
    raises(Status.INVALID_ARGUMENT, "rank: got 3, the mesh has ranks 4 … 7", mesh.members, "cp", 3)
    raises(Status.INVALID_ARGUMENT, "\"xx\" is no axis", mesh.groups, "xx")
    raises(Status.INVALID_ARGUMENT, "product 3", mesh.level_members, [3], 0, 5)
    raises(Status.INVALID_ARGUMENT, "level: got 1", mesh.level_members, [2], 1, 5)


# ParallelState


def test_accessors_of_the_documents_example():
    """World 16, tp2 cp2 dp2 pp2: rank 5 is tp 1, cp 0, dp 1, pp 0."""
    sizes = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2)
    state = cp.ParallelState(16, 5, **sizes, hierarchical_context_parallel_sizes=[2, 1], expert_model_parallel_size=4, expert_tensor_parallel_size=1)
    assert state.get_context_parallel_global_ranks() == [5, 7]
    assert (state.get_context_parallel_world_size(), state.get_context_parallel_rank()) == (2, 0)
    assert state.get_hierarchical_context_parallel_global_ranks() == [[5, 7], [5]]
    assert (state.get_tensor_and_context_parallel_world_size(), state.get_tensor_and_context_parallel_rank()) == (4, 1)
    assert (state.get_data_parallel_world_size(), state.get_data_parallel_rank(), state.get_data_parallel_src_rank()) == (2, 1, 1)
    with_cp = dict(with_context_parallel=True)
    assert [f(**with_cp) for f in (state.get_data_parallel_world_size, state.get_data_parallel_rank, state.get_data_parallel_src_rank)] == [4, 2, 1]
    assert (state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_src_rank(), state.get_model_parallel_src_rank()) == (1, 4, 4)
    stages = [getattr(state, f"get_pipeline_model_parallel_{name}_rank")() for name in ("first", "last", "next", "prev")]
    assert stages == [5, 13, 13, 13] and state.is_pipeline_first_stage() and not state.is_pipeline_last_stage()
    assert (state.get_expert_model_parallel_world_size(), state.get_expert_model_parallel_rank()) == (4, 1)
    assert (state.get_expert_tensor_parallel_world_size(), state.get_expert_data_parallel_world_size(), state.get_expert_data_parallel_rank()) == (1, 2, 1)
    other = cp.ParallelState(16, 5, **sizes, order="tp-cp-ep-pp-dp")
    assert other.get_data_parallel_src_rank() == 5 and other.get_pipeline_model_parallel_prev_rank() == 1
    raises(Status.INVALID_ARGUMENT, "other pipeline stages", cp.ParallelState, 16, 5, **sizes, order="tp-cp-ep-pp-dp", expert_model_parallel_size=4)
    raises(Status.INVALID_USAGE, "none was given to ParallelState", state.get_context_parallel_group)
    assert state.get_context_parallel_group(check_initialized=False) is None
    assert state.get_hierarchical_context_parallel_groups(check_initialized=False) is None
    raises(Status.INVALID_USAGE, "hierarchical_context_parallel_sizes", other.get_hierarchical_context_parallel_groups)
    raises(Status.INVALID_ARGUMENT, "the mesh has ranks 0 … 15", cp.ParallelState, 16, 16, **sizes)
    raises(Status.INVALID_ARGUMENT, "product 8", cp.ParallelState, 16, 0, **sizes, hierarchical_context_parallel_sizes=[4, 2])


def test_groups_are_subsets_that_work():
    """Eight threads, tp2 cp4: attention on the context-parallel group and on a hybrid one of three, and a barrier on every group there is."""
    groups = cp.Group.threads(8, timeout=30)
    q, k, v = (np.random.default_rng(i).standard_normal((1, 24, 2, 8)).astype(np.float32) for i in range(3))

    def work(group):
        state = cp.ParallelState(
            8, group.rank, tensor_model_parallel_size=2, context_parallel_size=4, hierarchical_context_parallel_sizes=[2, 2], group=group
        )
        mine = state.get_context_parallel_group()
        assert mine is state.get_context_parallel_group()
        assert mine.global_ranks == state.get_context_parallel_global_ranks() == [group.rank % 2 + 2 * i for i in range(4)]
        assert (mine.size, mine.rank) == (state.get_context_parallel_world_size(), state.get_context_parallel_rank())
        made = [mine, *state.get_hierarchical_context_parallel_groups(), state.get_tensor_and_context_parallel_group(), state.get_data_parallel_group()]
        made += [state.get_amax_reduction_group(c, t) for c in (False, True) for t in (False, True)]
        made += [state.get_tensor_and_data_parallel_group(with_context_parallel=True), state.get_model_parallel_group()]
        made += [state.get_expert_data_parallel_group(), state.get_expert_tensor_and_model_parallel_group()]
        made += [state.get_hybrid_data_context_parallel_groups(group_size=s) for s in (1, 2, 4)]
        for one in made:
            one.barrier()
        assert made[-1] is mine and state.get_hybrid_data_context_parallel_groups() is mine
        layer = cp.Attention(heads=2, kv_heads=2, head_dim=8, dtype="float32", causal=True)
        layer.set_group(group)
        outs = []
        three = state.mesh.rank_in("cp", group.rank) < 3
        if not three:
            raises(Status.INVALID_ARGUMENT, "leave over", state.get_hybrid_data_context_parallel_groups, group_size=3)
        for some in (mine, state.get_hybrid_data_context_parallel_groups(group_size=3) if three else None):
            if some is None:
                continue
            layer.set_group(some, "p2p")
            sequences = cp.Sequences.dense(1, 24)
            rows = cp.partition_tokens("zigzag", "bshd", sequences, some.size, some.rank)
            out, _, _ = layer.forward(*(np.ascontiguousarray(x[:, rows]) for x in (q, k, v)), sequences)
            outs.append((rows, out))
        return outs

    results = everywhere(groups, work)
    alone = cp.Attention(heads=2, kv_heads=2, head_dim=8, dtype="float32", causal=True)
    whole, _, _ = alone.forward(q, k, v, cp.Sequences.dense(1, 24))
    assert sum(len(outs) for outs in results) == 8 + 6
    for outs in results:
        for rows, out in outs:
            np.testing.assert_allclose(out, whole[:, rows], rtol=1e-5, atol=1e-6)
    raises(Status.INVALID_ARGUMENT, "give the group of all ranks", cp.ParallelState, 8, 1, group=groups[0])
    raises(Status.INVALID_ARGUMENT, "give the group of all ranks", cp.ParallelState, 16, 0, group=groups[0])
    for group in groups:
        group.close()


# Communication types


def test_communication_types_per_layer():
    assert cp.comm_types_per_layer("allgather", 2) == ["all_gather"] * 2
    assert cp.comm_types_per_layer(["a2a", "p2p"], 4) == cp.comm_types_per_layer("a2a,p2p", 4) == ["a2a", "p2p"] * 2
    assert cp.comm_types_per_layer(["p2p", "a2a+p2p", "all_gather"], 3) == ["p2p", "a2a+p2p", "all_gather"]
    raises(Status.INVALID_ARGUMENT, "got 2 names for 3 layers", cp.comm_types_per_layer, ["a2a", "p2p"], 3)
    raises(Status.INVALID_ARGUMENT, "got 0 names", cp.comm_types_per_layer, [], 3)
    raises(Status.INVALID_ARGUMENT, "got 4 names for 2", cp.comm_types_per_layer, ["p2p"] * 4, 2)
    raises(Status.INVALID_ARGUMENT, "allowed p2p, all_gather (or allgather), a2a, a2a+p2p", cp.comm_types_per_layer, "ring", 2)
    raises(Status.INVALID_ARGUMENT, "got 'p2p a2a'", cp.comm_types_per_layer, ["p2p a2a"], 2)
    raises(Status.INVALID_ARGUMENT, "got None", cp.comm_types_per_layer, [None], 2)
    raises(Status.INVALID_ARGUMENT, "layers: got 0", cp.comm_types_per_layer, "p2p", 0)


# Padding


def test_padding_is_megatrons_or_ours():
    cases = rows("padding.csv")
    assert len(cases) == 72
    recipe = {"off": None, "16": "tensorwise", "32": "mxfp8"}
    for c in cases:
        sizes = dict(cp_size=int(c["cp"]), tp_size=int(c["tp"]), has_sp=c["sequence_parallel"] == "1")
        fp8 = dict(fp8_enabled=c["fp8"] != "off", fp8_recipe=recipe[c["fp8"]])
        made = [cp.get_padding(n, **sizes, **fp8) for n in numbers(c["lengths"])]
        assert made == numbers(c["padding"]), c
        factor = cp.padding_factor(**sizes, fp8=recipe[c["fp8"]])
        assert factor % cp.padding_factor(**sizes, fp8=recipe[c["fp8"]], rule="megatron") == 0
        for n in numbers(c["lengths"]):
            assert (n + cp.get_padding(n, **sizes, **fp8, rule="every")) % factor == 0
    assert cp.padding_factor(4, 2, True, fp8="mxfp8") == 128
    assert cp.get_padding(1000, 2, 2, True, decoder_tp_comm_overlap=True, decoder_seq_len=4096) == 3096
    # Without sequence parallelism overlap changes nothing.
    assert cp.get_padding(1001, 2, 2, False, decoder_tp_comm_overlap=True) == 3
    raises(Status.INVALID_ARGUMENT, "decoder_seq_len: got None", cp.get_padding, 1000, 2, 2, True, decoder_tp_comm_overlap=True)
    raises(Status.INVALID_ARGUMENT, "the sequence has 1000", cp.get_padding, 1000, 2, 2, True, True, 999)
    raises(Status.INVALID_ARGUMENT, "fp8: got 'fp4'", cp.padding_factor, 2, fp8="fp4")
    raises(Status.INVALID_ARGUMENT, "rule: got", cp.padding_factor, 2, rule="mine")
    raises(Status.INVALID_ARGUMENT, "must be at least 1", cp.padding_factor, 0)


def test_sequences_of_a_pack():
    """TransformerEngine's unit tests of these functions, with their numbers."""
    ids, labels = np.array([1, 1, 1, 2, 2, 3, 3, 3, 3]), np.array([-100] * 7 + [13, -100])
    made = cp.pad_thd_sequences_for_cp(ids[None], labels[None], [0, 3, 5, 9], 8, padding_token_id=777, padding_label_id=-200)
    assert made[0].tolist() == [1] * 3 + [777] * 5 + [2] * 2 + [777] * 6 + [3] * 4 + [777] * 4
    assert made[1].tolist() == [-100] * 3 + [-200] * 5 + [-100] * 2 + [-200] * 6 + [-100, -100, 13, -100] + [-200] * 4
    assert made[2].tolist() == [0, 8, 16, 24]
    assert cp.generate_positional_ids_for_cp([0, 3, 5, 9], 8).tolist() == [*range(8)] * 3
    ids = np.repeat([1, 2, 3, 4], [2, 7, 4, 10])
    labels = np.concatenate([[10, 11], range(20, 27), range(30, 34), range(40, 50)])
    made = cp.pad_thd_sequences_for_cp(ids, labels, [0, 2, 9, 13, 23], 6)
    assert made[0].tolist() == [1] * 2 + [0] * 4 + [2] * 7 + [0] * 5 + [3] * 4 + [0] * 2 + [4] * 10 + [0] * 2
    assert made[1].tolist() == [10, 11, *[-100] * 4, *range(20, 27), *[-100] * 5, *range(30, 34), -100, -100, *range(40, 50), -100, -100]
    assert made[2].tolist() == [0, 6, 18, 24, 36] and made[0].dtype == ids.dtype
    assert cp.generate_positional_ids_for_cp([0, 2, 9, 13, 23], 6).tolist() == [*range(6), *range(12), *range(6), *range(12)]
    assert cp.pad_cu_seqlens(np.array([0, 7, 18, 23]), 4).tolist() == [0, 8, 20, 28]
    raises(Status.INVALID_ARGUMENT, "input_ids: got shape (8,), cu_seqlens say 9 tokens", cp.pad_thd_sequences_for_cp, range(8), range(9), [0, 9], 8)
    raises(Status.INVALID_ARGUMENT, "must never fall", cp.pad_cu_seqlens, [0, 5, 4], 4)
    raises(Status.INVALID_ARGUMENT, "must not be negative", cp.pad_cu_seqlens, [0, -5], 4)
    raises(Status.INVALID_ARGUMENT, "do not fit in int32", cp.pad_cu_seqlens, [0, 2**31 - 1], 4)
    raises(Status.INVALID_ARGUMENT, "factor: got 0", cp.pad_cu_seqlens, [0, 4], 0)


def test_tails_are_megatrons():
    cases = rows("tails.csv")
    assert len(cases) == 24
    for c in cases:
        how = dict(cp_size=int(c["ranks"]), tail=c["tail"], partition=c["partition"], max_num_seqs=int(c["slots"]) or None)
        how |= dict(alignment=int(c["multiple"])) if c["rows"] == "0" else dict(target_len=int(c["rows"]))
        cu, padded, longest = cp.pad_sequence_tail(numbers(c["cu"]), numbers(c["padded"]), **how)
        assert (cu.tolist(), padded.tolist(), longest) == (numbers(c["cu_filled"]), numbers(c["padded_filled"]), int(c["longest"])), c
    assert cp.pad_sequence_tail([0, 5], alignment=4)[0].tolist() == [0, 5, 8]
    raises(Status.INVALID_ARGUMENT, "choose an even number of rows", cp.pad_sequence_tail, [0, 8, 16], cp_size=2, target_len=9)
    raises(Status.INVALID_ARGUMENT, "exactly one", cp.pad_sequence_tail, [0, 8], alignment=4, target_len=9)
    raises(Status.INVALID_ARGUMENT, "exactly one", cp.pad_sequence_tail, [0, 8], alignment=0)
    raises(Status.INVALID_ARGUMENT, "tail: got 'wag'", cp.pad_sequence_tail, [0, 8], alignment=4, tail="wag")
    raises(Status.INVALID_ARGUMENT, "the dummy included", cp.pad_sequence_tail, [0, 8], alignment=16, max_num_seqs=1)


def test_multimodal_batches():
    dense = cp.get_packed_seq_params(2, 12, 0, 2)
    assert (dense["qkv_format"], dense["cu_seqlens"].tolist(), dense["cu_seqlens_padded"], dense["max_seqlen"]) == ("sbhd", [0, 12, 24], None, 12)
    made = cp.get_packed_seq_params(3, 12, 2, 2)
    assert (made["qkv_format"], made["cu_seqlens"].tolist(), made["cu_seqlens_padded"].tolist()) == ("thd", [0, 10, 20, 30], [0, 12, 24, 36])
    assert cp.get_packed_seq_params(3, 12, 2, 1)["qkv_format"] == "sbhd"
    assert cp.get_packed_seq_params(3, 12, 0, 2, True)["cu_seqlens_padded"].tolist() == [0, 12, 24, 36]
    raises(Status.INVALID_ARGUMENT, "13 of them padding", cp.get_packed_seq_params, 3, 12, 13, 2)
    # Five images on four ranks: 2, 2, 1 and a padded one, a padded pair.
    batch = np.arange(10).reshape(5, 2) + 1
    parts = [cp.split_to_context_parallel_ranks(batch, 4, rank, pad_value=-1) for rank in range(4)]
    assert [part.tolist() for part, _ in parts] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [-1, -1]], [[-1, -1], [-1, -1]]]
    assert {pad for _, pad in parts} == {3}
    assert cp.join_context_parallel_ranks([part for part, _ in parts], 3).tolist() == batch.tolist()
    turned = [cp.split_to_context_parallel_ranks(batch.T, 4, rank, axis=1)[0] for rank in range(4)]
    assert cp.join_context_parallel_ranks(turned, 3, axis=1).tolist() == batch.T.tolist()
    raises(Status.INVALID_ARGUMENT, "rank: got 4 of 4", cp.context_parallel_split, 5, 4, 4)


def test_images_stay_whole():
    assert cp.context_parallel_image_bounds([5] * 7, 4, rule="megatron") == [0, 1, 2, 3, 7]
    assert cp.context_parallel_image_bounds([5] * 7, 4) == [0, 2, 4, 6, 7]
    assert cp.context_parallel_image_bounds([5] * 2, 4, rule="megatron") == [0, 1, 2, 3, 4]
    assert cp.context_parallel_image_bounds([9, 1, 1, 1, 1, 1, 4], 3) == [0, 1, 6, 7]
    # A picture, a video of five frames in tubelets of two, a picture.
    assert cp.context_parallel_image_bounds([4] * 7, 5, num_frames=[1, 5, 1], temporal_patch_size=2) == [0, 1, 3, 5, 6, 7]
    raises(Status.UNSUPPORTED, "single images only", cp.context_parallel_image_bounds, [4] * 2, 2, temporal_patch_size=2, rule="megatron")
    raises(Status.INVALID_ARGUMENT, "not 7 images", cp.context_parallel_image_bounds, [4] * 7, 2, num_frames=[1, 5])
    raises(Status.INVALID_ARGUMENT, "must be at least 1", cp.context_parallel_image_bounds, [4] * 7, 2, temporal_patch_size=0)
