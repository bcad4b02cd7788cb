"""The peak of the memory that tensors take: what can be measured without a GPU. Source: ours."""

from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_of(step):
    """Run step() on the CPU -> bytes that tensors took at most, beyond what was there before.

    What a kernel allocates for itself counts too, as on a GPU.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
