"""Device models that ship with vq, beside the network device in `vq.net`: a module for each."""
