"""The thread that runs the engine: clients come and go, and an error ends a request, not the worker."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue

import pytest
import torch
from torch import nn

from phi2.config import Phi2Config
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine, Request
from phi2.inference.generate import generate
from phi2.model import Phi2ForCausalLM
from phi2.serve.worker import Worker

GREEDY = SamplingParams(max_new_tokens=12)


def tiny_model() -> Phi2ForCausalLM:
    shape = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = Phi2ForCausalLM(Phi2Config(**shape, max_position_embeddings=96, initializer_range=0.3, eos_token_id=None))
    model.init_weights(seed=1)
    return model.eval()


@pytest.fixture
def model() -> Phi2ForCausalLM:
    return tiny_model()


@pytest.fixture
def worker(model, tiny_tokenizer) -> Iterator[Worker]:
    worker = Worker(Engine(model, len(tiny_tokenizer), slots=2), tiny_tokenizer)
    yield worker
    worker.close()


def received(queue: SimpleQueue) -> list:
    """Everything up to the end of a reply, or its error."""
    chunks = [queue.get(timeout=60)]
    while not isinstance(chunks[-1], Exception) and not chunks[-1].finish_reason:
        chunks.append(queue.get(timeout=60))
    return chunks


def test_more_clients_than_slots_get_what_each_would_get_alone(worker, model, tiny_tokenizer):
    prompts = ["a", "def fib(n):", "12345 67890", "What?", "z"]
    queues = [SimpleQueue() for _ in prompts]
    for prompt, queue in zip(prompts, queues, strict=True):
        worker.submit(Request(tiny_tokenizer.encode(prompt), GREEDY, tiny_tokenizer.stop_ids), queue.put)
    texts = ["".join(chunk.text for chunk in received(queue)) for queue in queues]
    assert texts == [generate(model, tiny_tokenizer, prompt, max_new_tokens=12).text for prompt in prompts]


def test_a_client_that_has_gone_makes_room(worker, tiny_tokenizer):
    endless, queues = SamplingParams(max_new_tokens=90), [SimpleQueue() for _ in range(3)]
    gone = [Request([1], endless), Request([2], endless)]
    for request, queue in zip(gone, queues, strict=False):
        worker.submit(request, queue.put)
        queue.get(timeout=60)
    for request in gone:
        worker.cancel(request)
    worker.submit(Request([3], SamplingParams(max_new_tokens=2)), queues[2].put)
    assert len(received(queues[2])) == 2


def test_an_error_of_the_model_reaches_every_client_and_the_worker_goes_on(worker, model):
    queues = [SimpleQueue() for _ in range(3)]
    bias = model.model.layers[1].mlp.fc2.bias
    whole = bias.detach().clone()
    nn.init.constant_(bias, float("nan"))
    for queue in queues[:2]:
        worker.submit(Request([1, 2], GREEDY), queue.put)
    for queue in queues[:2]:
        assert "non-finite logits; first in model.layers.1.mlp.fc2" in str(received(queue)[-1])
    with torch.no_grad():
        bias.copy_(whole)
    worker.submit(Request([1, 2], GREEDY), queues[2].put)
    assert received(queues[2])[-1].finish_reason == "length"


def test_closing_tells_those_who_wait(model, tiny_tokenizer):
    worker, queue = Worker(Engine(model, len(tiny_tokenizer), slots=1), tiny_tokenizer), SimpleQueue()
    worker.submit(Request([1], SamplingParams(max_new_tokens=90)), queue.put)
    queue.get(timeout=60)
    worker.close()
    assert str(received(queue)[-1]) == "the engine has stopped"


def test_a_function_has_the_model_to_itself_and_the_replies_under_way_stay_right(worker, model, tiny_tokenizer):
    queue, prompt = SimpleQueue(), "def fib(n):"
    worker.submit(Request(tiny_tokenizer.encode(prompt), GREEDY, tiny_tokenizer.stop_ids), queue.put)
    with torch.no_grad():
        logits = [worker.run(lambda it: it(torch.tensor([[1, 2, 3]]))).result(timeout=60) for _ in range(3)]
        assert all(torch.equal(found, model(torch.tensor([[1, 2, 3]]))) for found in logits)
    text = "".join(chunk.text for chunk in received(queue))
    assert text == generate(model, tiny_tokenizer, prompt, max_new_tokens=12).text


def test_an_error_of_a_function_is_its_callers_alone(worker):
    def fail(model):
        raise ValueError("not this")

    with pytest.raises(ValueError, match="not this"):
        worker.run(fail).result(timeout=60)
    assert worker.run(lambda model: 1).result(timeout=60) == 1
