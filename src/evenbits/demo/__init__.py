"""Two small trained networks and their frozen data: enough to see a quantization method work, without a download.

`evenbits.demo.model` holds the networks, their loaders and the outlier planting. This module imports nothing, so that
`import evenbits.demo` stays light.
"""
