//! What callers call tensors.

use crate::plan::Tensor;

/// Name of a tensor as callers write it.
pub fn name(tensor: Tensor) -> &'static str {
    match tensor {
        Tensor::Q => "q",
        Tensor::K => "k",
        Tensor::V => "v",
        Tensor::Out => "out",
        Tensor::Lse => "lse",
        Tensor::DOut => "d_out",
        Tensor::DQ => "dq",
        Tensor::DK => "dk",
        Tensor::DV => "dv",
        Tensor::Delta => "delta",
        Tensor::Max => "max",
        Tensor::Sum => "sum",
        Tensor::Sinks => "sinks",
        Tensor::DSinks => "d_sinks",
        Tensor::SinkTerms => "sink terms",
        Tensor::Top => "row maxima",
        Tensor::MaxLogit => "max_logit",
        Tensor::Bias => "bias",
        Tensor::DBias => "d_bias",
        Tensor::Latent => "latent",
        Tensor::DLatent => "d_latent",
        Tensor::UpK => "up_k",
        Tensor::UpV => "up_v",
        Tensor::DUpK => "d_up_k",
        Tensor::DUpV => "d_up_v",
        Tensor::Local => "local",
        Tensor::Whole => "whole",
    }
}
