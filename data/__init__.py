"""What a run is fed with: manifests, audio files, a resumable sampler, batches, and synthetic speech to try it all.

Nothing is imported here, so that `python -m data.synthetic` and its workers start without torch.
"""
