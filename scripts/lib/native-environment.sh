# shellcheck shell=bash
# Sourced by what builds the addon. node-gyp takes the headers that came with this Node and Debian's own Python:
# no download, no version manager.
native_prefix=$(dirname "$(dirname "$(readlink -f "$(command -v node)")")")
if [[ -e $native_prefix/include/node/node_api.h ]]; then export npm_config_nodedir=$native_prefix; fi
export NODE_GYP_FORCE_PYTHON=/usr/bin/python3
