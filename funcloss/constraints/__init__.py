"""Floors and ceilings on what a model does, and dual ascent on class weights to keep them."""
