{
  "variables": { "sanitize_addon%": 0 },
  "targets": [
    {
      "target_name": "holdfast_native",
      "sources": ["src/addon.cc"],
      "include_dirs": ["<!(node -p \"require('node-addon-api').include_dir\")"],
      "defines": ["NAPI_VERSION=9", "NAPI_CPP_EXCEPTIONS"],
      "cflags": ["<!@(pkg-config --cflags libnbd libxxhash libcrypto)", "-Wall", "-Wextra", "-fvisibility=hidden"],
      "cflags_cc!": ["-fno-exceptions", "-fno-rtti", "-std=gnu++17", "-std=gnu++20"],
      "cflags_cc": ["-fexceptions", "-std=c++20", "-O2"],
      "libraries": ["<!@(pkg-config --libs libnbd libxxhash libcrypto)"],
      "conditions": [
        ["sanitize_addon==1", {
          "cflags": ["-fsanitize=address,undefined", "-g", "-O1"],
          "ldflags": ["-fsanitize=address,undefined"]
        }]
      ]
    }
  ]
}
