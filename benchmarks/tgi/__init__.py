"""Inbetweening on TGI-Bench and on sets like it: the data, the arms of a comparison, and its figures."""
