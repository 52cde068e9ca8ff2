# Completion of clip-base and regionclip in zsh: eval "$(regionclip completion zsh)"

_clip_base_complete() {
    local line word files=""
    local -a whole begun
    for line in "${(@f)$("${words[1]}" completion --words "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}"; do
        word=${line%%$'\t'*}
        if [[ $word == :files ]]; then
            files=1
        elif [[ $word == *[=.] ]]; then
            begun+=("${word//:/\\:}:${line#*$'\t'}")
        elif [[ -n $word && $line == *$'\t'* ]]; then
            whole+=("${word//:/\\:}:${line#*$'\t'}")
        elif [[ -n $word ]]; then
            whole+=("${word//:/\\:}")
        fi
    done
    (( $#whole )) && _describe -V 'word' whole
    (( $#begun )) && _describe -V 'option' begun -S ''
    if [[ -n $files ]]; then
        compset -P '*='
        _files
    fi
}

(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _clip_base_complete clip-base regionclip
