"""Documents of a window: told apart by their tokens, and computed as if each were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.documents import document_mark, number_documents
from core.model import Compute, forward, logits
from tests.core.test_model import FLOAT32, errors
from tests.models import GPT, GROUPED, LLAMA, flat, random_params
from tests.packed import BOTH_MARKS, EOS_ALONE, ONE_MARK, alone64, windows


@pytest.mark.parametrize("marks", [BOTH_MARKS, EOS_ALONE, ONE_MARK], ids=["two", "eos", "one"])
@pytest.mark.parametrize("context", [7, 16])
def test_documents_are_told_apart_wherever_a_window_begins(marks, context: int):
    tokens, owners = windows(marks, context)
    begins = np.diff(owners, axis=1) != 0
    assert begins.any(axis=1).sum() > 5
    for inputs in (tokens[:, :-1], jnp.asarray(tokens[:, :-1])):
        found = number_documents(inputs, document_mark(marks))
        assert isinstance(found, type(inputs)) and found.dtype == np.int32
        np.testing.assert_array_equal(np.diff(np.asarray(found), axis=1), begins)
    assert number_documents(tokens, None) is None


@pytest.mark.parametrize(
    ("config", "compute"),
    [
        (GPT, Compute()),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((LLAMA, Compute()), (GROUPED, Compute(remat="full")), (GPT, Compute(unroll=3)))
        ),
    ],
)
def test_a_packed_window_is_its_documents_alone(config, compute):
    params, (tokens, owners) = random_params(config), windows(BOTH_MARKS, 48)
    tokens, owners = tokens[:2].astype(np.int32), owners[:2]
    assert (owners[:, -1] - owners[:, 0] >= 2).all()
    true_scores, true_loss, true_gradients = alone64(config, params, tokens, owners)

    @jax.jit
    def run(params, tokens):
        def loss(params):
            documents = number_documents(tokens[:, :-1], document_mark(BOTH_MARKS))
            hidden = forward(config, params, tokens[:, :-1], compute, documents=documents)
            scores = logits(config, params, hidden)
            picked = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], -1)
            return -picked.mean(), scores

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, scores), gradients = run(params, jnp.asarray(tokens))
    assert abs(float(loss) - true_loss) <= FLOAT32 * true_loss
    found = errors(np.asarray(scores), flat(gradients), true_scores, true_gradients)
    assert max(found.values()) < FLOAT32, found
    through = alone64(config, params, tokens, np.zeros_like(owners))[1]
    assert abs(through - true_loss) > 1e-3 * true_loss  # as one document a row it is another loss
