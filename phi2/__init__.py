"""phi2: Microsoft's Phi-2 from scratch, with its own SFT and preference optimisation.

model, tokenizer = phi2.load("rasyosef/phi-2-instruct-v0.1")
print(phi2.generate(model, tokenizer, [{"role": "user", "content": "Solve 2x + 3 = 7."}]))
"""

from phi2.chat import ChatSession
from phi2.generate import generate, stream
from phi2.lora import LoraConfig
from phi2.losses.preference import PairBatch, preference_loss
from phi2.weights import load, save_pretrained

__version__ = "0.1.0"
__all__ = ["ChatSession", "LoraConfig", "PairBatch", "generate", "load", "preference_loss", "save_pretrained", "stream"]
