/* The layout of every struct of the C ABI on LP64, frozen: a change here breaks programs that are already compiled. New fields are only
 * appended (and asserted here); cp_tensor, cp_context, cp_unique_id, cp_stretch, cp_piece and cp_message never change. */
#include "context_parallel.h"

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "the size of " #type " changed")
#define AT(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field " moved")

_Static_assert(sizeof(void *) == 8 && sizeof(long) == 8 && sizeof(size_t) == 8, "these layouts are those of LP64");
_Static_assert(sizeof(cp_status) == 4 && (cp_status)-1 < 0, "cp_status is a signed 32-bit integer");

SIZE(cp_unique_id, 128);
AT(cp_unique_id, bytes, 0);

SIZE(cp_piece, 16);
AT(cp_piece, ptr, 0);
AT(cp_piece, bytes, 8);

SIZE(cp_message, 16);
AT(cp_message, peer, 0);
AT(cp_message, n_pieces, 4);
AT(cp_message, pieces, 8);

SIZE(cp_transport_ops, 64);
AT(cp_transport_ops, struct_size, 0);
AT(cp_transport_ops, flags, 4);
AT(cp_transport_ops, ctx, 8);
AT(cp_transport_ops, start, 16);
AT(cp_transport_ops, test, 24);
AT(cp_transport_ops, cancel, 32);
AT(cp_transport_ops, allgather, 40);
AT(cp_transport_ops, destroy, 48);
AT(cp_transport_ops, waiting_for, 56);

SIZE(cp_group_config, 88);
AT(cp_group_config, struct_size, 0);
AT(cp_group_config, flags, 4);
AT(cp_group_config, rank, 8);
AT(cp_group_config, size, 12);
AT(cp_group_config, bootstrap, 16);
AT(cp_group_config, transport_kind, 20);
AT(cp_group_config, id, 24);
AT(cp_group_config, allgather, 32);
AT(cp_group_config, allgather_ctx, 40);
AT(cp_group_config, transport, 48);
AT(cp_group_config, timeout_ms, 56);
AT(cp_group_config, device_type, 64);
AT(cp_group_config, device_id, 68);
AT(cp_group_config, nccl_comm, 72);
AT(cp_group_config, nccl_library, 80);

SIZE(cp_statistics, 32);
AT(cp_statistics, struct_size, 0);
AT(cp_statistics, flags, 4);
AT(cp_statistics, sent_bytes, 8);
AT(cp_statistics, received_bytes, 16);
AT(cp_statistics, exposed_ns, 24);

SIZE(cp_mesh, 48);
AT(cp_mesh, struct_size, 0);
AT(cp_mesh, flags, 4);
AT(cp_mesh, tp, 8);
AT(cp_mesh, cp, 12);
AT(cp_mesh, ep, 16);
AT(cp_mesh, dp, 20);
AT(cp_mesh, pp, 24);
AT(cp_mesh, world_size, 28);
AT(cp_mesh, first_rank, 32);
AT(cp_mesh, reserved, 36);
AT(cp_mesh, order, 40);

SIZE(cp_padding_config, 32);
AT(cp_padding_config, struct_size, 0);
AT(cp_padding_config, flags, 4);
AT(cp_padding_config, tp, 8);
AT(cp_padding_config, cp, 12);
AT(cp_padding_config, fp8, 16);
AT(cp_padding_config, reserved, 20);
AT(cp_padding_config, decoder_length, 24);

SIZE(cp_tail_config, 40);
AT(cp_tail_config, struct_size, 0);
AT(cp_tail_config, flags, 4);
AT(cp_tail_config, ranks, 8);
AT(cp_tail_config, partition, 12);
AT(cp_tail_config, tail, 16);
AT(cp_tail_config, slots, 20);
AT(cp_tail_config, multiple, 24);
AT(cp_tail_config, rows, 32);

SIZE(cp_schedule_config, 64);
AT(cp_schedule_config, struct_size, 0);
AT(cp_schedule_config, flags, 4);
AT(cp_schedule_config, ranks, 8);
AT(cp_schedule_config, tokens_per_rank, 12);
AT(cp_schedule_config, scheduler, 16);
AT(cp_schedule_config, cp_size, 20);
AT(cp_schedule_config, cost_pair, 24);
AT(cp_schedule_config, cost_token, 32);
AT(cp_schedule_config, cost_wire, 40);
AT(cp_schedule_config, cost_rank, 48);
AT(cp_schedule_config, cost_call, 56);

SIZE(cp_placement, 16);
AT(cp_placement, micro_batch, 0);
AT(cp_placement, first_rank, 4);
AT(cp_placement, rank_count, 8);
AT(cp_placement, pack, 12);

SIZE(cp_stretch, 16);
AT(cp_stretch, seq, 0);
AT(cp_stretch, start, 4);
AT(cp_stretch, step, 8);
AT(cp_stretch, len, 12);

SIZE(cp_mask_slice, 32);
AT(cp_mask_slice, sequence, 0);
AT(cp_mask_slice, q_begin, 4);
AT(cp_mask_slice, q_end, 8);
AT(cp_mask_slice, k_begin, 12);
AT(cp_mask_slice, k_end, 16);
AT(cp_mask_slice, flags, 20);
AT(cp_mask_slice, lo, 24);
AT(cp_mask_slice, hi, 28);

SIZE(cp_sequences, 136);
AT(cp_sequences, struct_size, 0);
AT(cp_sequences, flags, 4);
AT(cp_sequences, count, 8);
AT(cp_sequences, seq_q, 12);
AT(cp_sequences, seq_k, 16);
AT(cp_sequences, reserved, 20);
AT(cp_sequences, lens_q, 24);
AT(cp_sequences, lens_k, 32);
AT(cp_sequences, before_q, 40);
AT(cp_sequences, before_k, 48);
AT(cp_sequences, cu_seqlens_q, 56);
AT(cp_sequences, cu_seqlens_k, 64);
AT(cp_sequences, cu_seqlens_q_padded, 72);
AT(cp_sequences, cu_seqlens_k_padded, 80);
AT(cp_sequences, list_q, 88);
AT(cp_sequences, list_k, 96);
AT(cp_sequences, list_q_counts, 104);
AT(cp_sequences, list_k_counts, 112);
AT(cp_sequences, slices, 120);
AT(cp_sequences, slice_count, 128);

SIZE(cp_trade_args, 64);
AT(cp_trade_args, struct_size, 0);
AT(cp_trade_args, flags, 4);
AT(cp_trade_args, sequences, 8);
AT(cp_trade_args, partition, 16);
AT(cp_trade_args, format, 20);
AT(cp_trade_args, heads, 24);
AT(cp_trade_args, count, 28);
AT(cp_trade_args, local, 32);
AT(cp_trade_args, whole, 40);
AT(cp_trade_args, workspace, 48);
AT(cp_trade_args, workspace_bytes, 56);

SIZE(cp_attention_config, 144);
AT(cp_attention_config, struct_size, 0);
AT(cp_attention_config, flags, 4);
AT(cp_attention_config, heads, 8);
AT(cp_attention_config, kv_heads, 12);
AT(cp_attention_config, head_dim_qk, 16);
AT(cp_attention_config, head_dim_v, 20);
AT(cp_attention_config, dtype, 24);
AT(cp_attention_config, format, 28);
AT(cp_attention_config, partition, 32);
AT(cp_attention_config, window_left, 36);
AT(cp_attention_config, window_right, 40);
AT(cp_attention_config, softmax_scale, 44);
AT(cp_attention_config, max_tokens_per_rank, 48);
AT(cp_attention_config, threads, 52);
AT(cp_attention_config, device_type, 56);
AT(cp_attention_config, device_id, 60);
AT(cp_attention_config, sm_margin, 64);
AT(cp_attention_config, max_segments, 68);
AT(cp_attention_config, device_alloc, 72);
AT(cp_attention_config, device_free, 80);
AT(cp_attention_config, device_alloc_ctx, 88);
AT(cp_attention_config, softcap, 96);
AT(cp_attention_config, dropout, 100);
AT(cp_attention_config, alibi_slopes, 104);
AT(cp_attention_config, head_offset, 112);
AT(cp_attention_config, sinks, 116);
AT(cp_attention_config, max_logit, 120);
AT(cp_attention_config, bias, 124);
AT(cp_attention_config, kv_wire, 128);
AT(cp_attention_config, reserved, 132);
AT(cp_attention_config, latent_dim, 136);
AT(cp_attention_config, latent_rope, 140);

SIZE(cp_comm_config, 48);
AT(cp_comm_config, struct_size, 0);
AT(cp_comm_config, flags, 4);
AT(cp_comm_config, comm_type, 8);
AT(cp_comm_config, stages, 12);
AT(cp_comm_config, level_count, 16);
AT(cp_comm_config, reserved, 20);
AT(cp_comm_config, level_sizes, 24);
AT(cp_comm_config, memory_cap_bytes, 40);

SIZE(cp_report, 104);
AT(cp_report, struct_size, 0);
AT(cp_report, flags, 4);
AT(cp_report, forward_workspace, 8);
AT(cp_report, backward_workspace, 16);
AT(cp_report, saved, 24);
AT(cp_report, transport, 32);
AT(cp_report, kernels, 40);
AT(cp_report, forward_sent, 48);
AT(cp_report, forward_received, 56);
AT(cp_report, backward_sent, 64);
AT(cp_report, backward_received, 72);
AT(cp_report, forward_flops, 80);
AT(cp_report, backward_flops, 88);
AT(cp_report, stages, 96);
AT(cp_report, inner, 100);

SIZE(cp_tensor, 96);
AT(cp_tensor, data, 0);
AT(cp_tensor, device_type, 8);
AT(cp_tensor, device_id, 12);
AT(cp_tensor, dtype_code, 16);
AT(cp_tensor, dtype_bits, 17);
AT(cp_tensor, dtype_lanes, 18);
AT(cp_tensor, ndim, 20);
AT(cp_tensor, shape, 24);
AT(cp_tensor, stride, 56);
AT(cp_tensor, reserved, 88);

SIZE(cp_context, 32);
AT(cp_context, problem, 0);
AT(cp_context, attached, 8);
AT(cp_context, dropout_seed, 16);
AT(cp_context, flags, 24);

SIZE(cp_forward_args, 1128);
AT(cp_forward_args, struct_size, 0);
AT(cp_forward_args, flags, 4);
AT(cp_forward_args, sequences, 8);
AT(cp_forward_args, q, 16);
AT(cp_forward_args, k, 112);
AT(cp_forward_args, v, 208);
AT(cp_forward_args, out, 304);
AT(cp_forward_args, lse, 400);
AT(cp_forward_args, saved, 496);
AT(cp_forward_args, saved_bytes, 504);
AT(cp_forward_args, workspace, 512);
AT(cp_forward_args, workspace_bytes, 520);
AT(cp_forward_args, context, 528);
AT(cp_forward_args, sinks, 536);
AT(cp_forward_args, max_logit, 632);
AT(cp_forward_args, dropout_seed, 728);
AT(cp_forward_args, sequence_ids, 736);
AT(cp_forward_args, bias, 744);
AT(cp_forward_args, latent, 840);
AT(cp_forward_args, up_k, 936);
AT(cp_forward_args, up_v, 1032);

SIZE(cp_backward_args, 1888);
AT(cp_backward_args, struct_size, 0);
AT(cp_backward_args, flags, 4);
AT(cp_backward_args, sequences, 8);
AT(cp_backward_args, context, 16);
AT(cp_backward_args, q, 24);
AT(cp_backward_args, k, 120);
AT(cp_backward_args, v, 216);
AT(cp_backward_args, out, 312);
AT(cp_backward_args, lse, 408);
AT(cp_backward_args, d_out, 504);
AT(cp_backward_args, dq, 600);
AT(cp_backward_args, dk, 696);
AT(cp_backward_args, dv, 792);
AT(cp_backward_args, saved, 888);
AT(cp_backward_args, saved_bytes, 896);
AT(cp_backward_args, workspace, 904);
AT(cp_backward_args, workspace_bytes, 912);
AT(cp_backward_args, sinks, 920);
AT(cp_backward_args, d_sinks, 1016);
AT(cp_backward_args, sequence_ids, 1112);
AT(cp_backward_args, bias, 1120);
AT(cp_backward_args, d_bias, 1216);
AT(cp_backward_args, latent, 1312);
AT(cp_backward_args, up_k, 1408);
AT(cp_backward_args, up_v, 1504);
AT(cp_backward_args, d_latent, 1600);
AT(cp_backward_args, d_up_k, 1696);
AT(cp_backward_args, d_up_v, 1792);

SIZE(cp_loss_config, 32);
AT(cp_loss_config, struct_size, 0);
AT(cp_loss_config, mean, 4);
AT(cp_loss_config, gradients, 8);
AT(cp_loss_config, cp_size, 12);
AT(cp_loss_config, dp_size, 16);
AT(cp_loss_config, microbatches, 20);
AT(cp_loss_config, tokens, 24);

SIZE(cp_rows_args, 72);
AT(cp_rows_args, struct_size, 0);
AT(cp_rows_args, flags, 4);
AT(cp_rows_args, sequences, 8);
AT(cp_rows_args, partition, 16);
AT(cp_rows_args, format, 20);
AT(cp_rows_args, side, 24);
AT(cp_rows_args, shift, 28);
AT(cp_rows_args, row_bytes, 32);
AT(cp_rows_args, local, 40);
AT(cp_rows_args, local_rows, 48);
AT(cp_rows_args, out, 56);
AT(cp_rows_args, out_rows, 64);

int main(void) {
    return 0;
}
