import dataclasses

import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.text_encoder import FLAN_T5_XL, T5Config

PUBLIC = {
    "vocab_size": 32128,
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "architectures": ["T5ForConditionalGeneration"],
}


def test_reads_a_public_configuration_file():
    assert T5Config.from_dict(PUBLIC) == FLAN_T5_XL


def test_round_trip_keeps_every_field():
    config = T5Config(7, 6, 5, 4, 3, 2, 8, 40, 1e-5, "bfloat16")
    assert T5Config.from_dict(config.to_dict()) == config
    assert hash(T5Config.from_dict(config.to_dict())) == hash(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model 0: must be a positive integer"),
        ({"d_model": True}, "d_model True: must be a positive integer"),
        ({"num_layers": "24"}, "num_layers '24': must be a positive integer"),
        ({"relative_attention_num_buckets": 30}, "relative_buckets 30: must be a multiple of 4"),
        ({"relative_attention_max_distance": 8}, "must exceed a quarter of relative_buckets"),
        ({"layer_norm_epsilon": 0.0}, "norm_epsilon 0.0"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon '1e-6': must be a decimal number"),
        ({"compute_dtype": "float16"}, "compute_dtype 'float16': must be one of float32, bfloat16"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu': must be 'gated-gelu'"),
    ],
)
def test_refuses_what_it_cannot_run(change, message):
    with pytest.raises(UserInputError, match=message):
        T5Config.from_dict(PUBLIC | change)


def test_names_all_missing_keys():
    incomplete = {key: value for key, value in PUBLIC.items() if key not in ("d_kv", "d_ff")}
    with pytest.raises(UserInputError, match="without d_kv, d_ff"):
        T5Config.from_dict(incomplete)


def test_refuses_sizes_given_in_code():
    with pytest.raises(UserInputError, match="T5 num_heads -1: must be a positive integer"):
        dataclasses.replace(FLAN_T5_XL, num_heads=-1)
