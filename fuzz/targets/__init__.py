"""One module for each target: ``run(data)`` raises when a rule was broken."""
