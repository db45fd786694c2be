/* A layer whose keys and values are made of latents: what belongs to it wrong in turn. Included by badinput.h. */

static cp_tensor weights(float *data) {
    cp_tensor t = rows(data, 1, 1);
    t.ndim = 3;
    t.shape[0] = HEADS;
    t.shape[1] = t.shape[2] = DIM;
    t.shape[3] = t.stride[3] = 0;
    t.stride[0] = DIM * DIM;
    t.stride[1] = DIM;
    t.stride[2] = 1;
    return t;
}

#define LATENT(PASS_, t, last, output)                                                                                      \
    do {                                                                                                                    \
        PASS_(INVALID, "args." #t ": got NULL, the layer asks for it", memset(&a.t, 0, sizeof a.t));                        \
        PASS_(INVALID, #t ".data: got", a.t.data = NULL);                                                                   \
        PASS_(CP_ERR_UNSUPPORTED, #t ".device_type: got 2", a.t.device_type = CP_DEVICE_CUDA);                              \
        PASS_(INVALID, #t ".dtype: got (code, bits, lanes) = (2, 16, 1)", a.t.dtype_bits = 16);                             \
        PASS_(INVALID, #t ".ndim: got 2", a.t.ndim = 2);                                                                    \
        PASS_(INVALID, #t ": got shape", a.t.shape[0] += 1);                                                                \
        PASS_(INVALID, #t ": got shape", a.t.shape[1] -= 1);                                                                \
        PASS_(INVALID, #t ": got shape", a.t.shape[last] -= 1);                                                             \
        PASS_(INVALID, #t ".stride[" #last "]: got 2", a.t.stride[last] = 2);                                               \
        if (output)                                                                                                         \
            PASS_(INVALID, #t ".stride: 0 elements overlap", a.t.stride[1] = 0);                                            \
    } while (0)

static void wrong_latents(side *s) {
    cp_attention_config config = small_layer();
    cp_comm_config comm = ring();
    cp_tensor some;
    int n = TOKENS / s->size;
    config.kv_heads = 0;
    config.latent_dim = DIM;
    comm.comm_type = CP_COMM_A2A;
    side_open(s, CP_TRANSPORT_AUTO, 30000);
    GOOD(cp_attention_destroy(s->layer));
    GOOD(cp_attention_create(&config, &s->layer));
    GOOD(cp_set_group(s->layer, s->group, &comm));
    some = s->f.k;
    memset(&s->f.k, 0, sizeof s->f.k);
    memset(&s->f.v, 0, sizeof s->f.v);
    s->b.k = s->b.v = s->b.dk = s->b.dv = s->f.k;
    fill(s->latent, TOKENS * DIM, 7);
    fill(s->up_k, HEADS * DIM * DIM, 8);
    fill(s->up_v, HEADS * DIM * DIM, 9);
    s->f.latent = s->b.latent = rows(s->latent, n, 1);
    s->f.up_k = s->b.up_k = weights(s->up_k);
    s->f.up_v = s->b.up_v = weights(s->up_v);
    s->b.d_latent = rows(s->o.d_latent, n, 1);
    s->b.d_up_k = weights(s->o.d_up_k);
    s->b.d_up_v = weights(s->o.d_up_v);
    works(s);
    s->good = s->o;
    FORWARD(INVALID, "args.k: given, but the layer makes keys and values of latents", a.k = some);
    FORWARD(INVALID, "args.v: given, but the layer makes keys and values of latents", a.v = some);
    LATENT(FORWARD, latent, 3, 0);
    LATENT(FORWARD, up_k, 2, 0);
    LATENT(FORWARD, up_v, 2, 0);
    TRUE_(works(s));
    BACKWARD(INVALID, "args.k: given, but the layer makes keys and values of latents", a.k = some);
    BACKWARD(INVALID, "args.dk: given, but the layer makes keys and values of latents", a.dk = some);
    BACKWARD(INVALID, "args.dv: given, but the layer makes keys and values of latents", a.dv = some);
    LATENT(BACKWARD, latent, 3, 0);
    LATENT(BACKWARD, up_k, 2, 0);
    LATENT(BACKWARD, up_v, 2, 0);
    LATENT(BACKWARD, d_latent, 3, 1);
    LATENT(BACKWARD, d_up_k, 2, 1);
    LATENT(BACKWARD, d_up_v, 2, 1);
    TRUE_(works(s));
    side_close(s);
}
