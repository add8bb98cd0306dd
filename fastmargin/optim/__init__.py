"""Optimizers of class weights: torch's SGD and AdamW on the rows that were used, optionally in the backward pass.

Which optimizer when: one of torch on `head.parameters()` takes the dense gradient of all classes; ClassSGD and
ClassAdamW are for steps inside the backward pass (no gradient of the weight's size) and for sampled classes (only their
rows are read and changed).

Each is a torch Optimizer of one parameter, `head.weight`: param_groups, state_dict and learning-rate schedulers work as
usual. All other parameters (the backbone, `head.replicated_parameters()`) need an ordinary optimizer of their own. A
head has one class optimizer at a time: `detach()` takes it off.

in_backward=True steps inside the backward pass, a block of classes at a time: the gradient of the whole weight is never
stored, only the weight and the optimizer's state are. `step()` still ends every step. Without it, `zero_grad()` does:
after a forward pass alone nothing has changed, and the head can be called again, or that pass still be back-propagated;
after a backward pass the weights have changed, and the step counts as if `step()` had been called. (The backends triton
and reference compute the whole gradient first.) Every backward pass changes the weights, also one by autograd.grad.
Graphs that saved the old weights then raise, as after any write in place: so if another loss term reads `head.weight`
and is back-propagated together with the head's loss, compute that term after the head's loss.
"""

from fastmargin.optim.adamw import ClassAdamW
from fastmargin.optim.sgd import ClassSGD

__all__ = ["ClassAdamW", "ClassSGD"]
