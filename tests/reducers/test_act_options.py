"""ACT's options: published rows, defaults, mistakes."""

import pytest

import hvit_jax
from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError
from hvit_jax.reducers import make_reducer
from tests.published_rows import published, row_config, row_name, token_counts

TOKENS, HEADS = 49, 2


class TestTables:
    @pytest.mark.parametrize("row", published("act"), ids=row_name)
    def test_gflops_at_the_mean_number_of_clusters(self, row):
        """The mean is rounded to a whole cluster, which is 0.05 (L/16) or 0.12 (H/14) GFLOPs."""
        mean, published = row["mean_clusters_implied"], row["published"]["gflops"]
        less, gflops, more = (
            count_flops(row_config(row), make_reducer("act", **row["args"], max_clusters=clusters))
            / 1e9
            for clusters in (mean - 1, mean, mean + 1)
        )
        assert less < published < more
        assert gflops == pytest.approx(published, abs=0.11)

    @pytest.mark.parametrize("row", published("act"), ids=row_name)
    def test_full_size_models_trace(self, row):
        config = row_config(row)
        reducer = make_reducer("act", **row["args"], max_clusters=row["mean_clusters_implied"])
        assert token_counts(config, reducer) == [config.num_patches + 1] * config.depth

    def test_defaults(self, small_config):
        resolved = make_reducer("act").resolve(small_config)
        assert (resolved.first_block, resolved.last_block) == (0, 3)
        assert (resolved.q_hashes, resolved.max_clusters) == (24, TOKENS)

    def test_grouped_keys_save_products(self, small_config):
        """Blocks of 20 query means on 20 key means instead of on 49 keys; 4 hashes of keys more."""
        plain = make_reducer("act", max_clusters=20)
        grouped = make_reducer("act", max_clusters=20, group_keys=True, k_hashes=4)
        width, pairs = 32, 20 * (49 - 20)
        saved = pairs * (2 * width + 6 * HEADS) - 2 * HEADS * 20 * 20 - TOKENS * width * 4
        difference = count_flops(small_config, plain) - count_flops(small_config, grouped)
        assert difference == small_config.depth * saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_hashes": 0}, "q_hashes=0: from 1 to 32"),
        ({"q_hashes": 33}, "q_hashes=33: from 1 to 32"),
        ({"k_hashes": 0}, "k_hashes=0: from 1 to 32"),
        ({"max_clusters": 1}, "max_clusters=1: at least 2"),
        ({"max_clusters": (9, 9, 9, 1)}, r"max_clusters=\(9, 9, 9, 1\): at least 2"),
        ({"max_clusters": (9, 9)}, "one for each of 4 blocks"),
        ({"max_clusters": ()}, "one for each of 4 blocks"),
        ({"max_clusters": 9.5}, "max_clusters must be"),
        ({"first_block": 4}, "first_block=4: the model's blocks are 0 to 3"),
        ({"first_block": -1}, "first_block=-1: the model's blocks are 0 to 3"),
        ({"first_block": 2, "last_block": 1}, "last_block=1: from first_block=2 to 3"),
        ({"last_block": 4}, "last_block=4: from first_block=0 to 3"),
        ({"hash_seed": -1}, "hash_seed=-1: from 0 to 4294967295"),
    ],
)
def test_bad_options(small_config, options, message):
    with pytest.raises(InputError, match=message):
        hvit_jax.create(small_config, "act", **options)
